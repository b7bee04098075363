"""LongNetLM: causality, initialisation, options, checkpointing, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM


def _lm(dtype: torch.dtype | None = None, **changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig.preset("nano", **changes), dtype=dtype)


def _tokens(batch: int = 2, length: int = 75, seed: int = 1, vocab: int = 256) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "rms", "kv_heads": 2, "qk_norm": True},
    {"use_xpos": False, "use_rel_pos_bias": True, "bias": False},
    {"use_rel_pos_bias": True, "tie_embeddings": False, "ffn_dim": 48},
    {"segment_lengths": (7, 20), "dilation_rates": (1, 3), "head_offsets": "blocked", "kv_heads": 1},
]


@pytest.mark.parametrize("changes", OPTIONS)
def test_the_future_never_reaches_the_past(changes: dict[str, Any]) -> None:
    model, tokens = _lm(**changes).eval(), _tokens()
    with torch.no_grad():
        before = model(tokens)
        for cut in (0, 1, 31, 32, 74):
            changed = tokens.clone()
            changed[:, cut:] = _tokens(seed=2)[:, cut:]
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("changes", OPTIONS)
@pytest.mark.parametrize("length", [1, 37])
def test_every_option_trains_a_step(changes: dict[str, Any], length: int) -> None:
    model, tokens = _lm(**changes), _tokens(length=length + 1)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # With one token a softmax over one key has no gradient for what makes the scores.
    if length > 1:
        assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if not n.endswith("k_proj.bias"))


def test_shapes_and_empty_inputs() -> None:
    model = _lm(kv_heads=2)
    for batch, length in ((1, 1), (3, 2), (1, 129), (2, 0), (0, 5)):
        tokens = _tokens(batch, length)
        assert model(tokens).shape == (batch, length, 256)
        assert model.hidden(tokens).shape == (batch, length, 32)


@pytest.mark.parametrize("tie", [True, False])
def test_first_loss_is_near_the_uniform_one(tie: bool) -> None:
    """Logits of variance 1 cost half a nat more than uniform guessing."""
    model, tokens = _lm(dim=128, layers=4, tie_embeddings=tie), _tokens(2, 257)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert math.log(256) - 0.05 < loss < math.log(256) + 0.75
    assert model(tokens).std().item() == pytest.approx(1.0, abs=0.15)
    assert model.embed(tokens).std().item() == pytest.approx(1.0, abs=0.05)


def test_initialisation_is_magnetos() -> None:
    model = _lm(dim=128, layers=4, kv_heads=2)
    gain = math.sqrt(math.log(8))
    attention, feed_forward = model.blocks[1].attention, model.blocks[1].feed_forward
    for linear, expected in (
        (attention.q_proj, 1.0),
        (attention.k_proj, 1.0),
        (attention.v_proj, gain),
        (attention.out_proj, gain),
        (feed_forward.fc1, gain),
        (feed_forward.fc2, gain),
    ):
        std = expected * math.sqrt(2 / (linear.in_features + linear.out_features))
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not linear.bias.any()
    assert model.embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


def test_reset_parameters_starts_over() -> None:
    model, tokens = _lm(use_rel_pos_bias=True, tie_embeddings=False), _tokens()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss(tokens, tokens).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.manual_seed(3)
    model.reset_parameters()
    for name, value in model.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(value, start[name]), name
        else:
            assert value.std().item() == pytest.approx(start[name].std().item(), rel=0.3), name


def test_untied_head_is_a_parameter_of_its_own() -> None:
    tied, untied = _lm(), _lm(tie_embeddings=False)
    assert "head.weight" not in tied.state_dict() and "head.weight" in untied.state_dict()
    hidden = torch.randn(3, 32)
    assert torch.equal(tied.logits(hidden), hidden @ tied.embedding.weight.t())
    assert torch.equal(untied.logits(hidden), hidden @ untied.head.weight.t())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    model, tokens = _lm(torch.float64, dropout=dropout, kv_heads=2), _tokens()
    gradients = []
    for flag in (False, True):
        model.gradient_checkpointing = flag
        model.zero_grad()
        torch.manual_seed(5)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            loss = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        gradients.append(([p.grad.clone() for p in model.parameters()], sum(saved)))
    (plain, held), (recomputed, held_checkpointed) = gradients
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert held_checkpointed < held / 4


def test_checkpointing_follows_the_config_and_needs_no_gradients() -> None:
    model = _lm(gradient_checkpointing=True)
    assert model.gradient_checkpointing
    with torch.no_grad():
        assert not model(_tokens()).requires_grad
    model.gradient_checkpointing = False
    assert model(_tokens()).requires_grad


def test_dropout_only_in_training() -> None:
    model, tokens = _lm(dropout=0.5), _tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    plain = _lm().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("changes", [{}, {"norm": "rms", "qk_norm": True}])
def test_bfloat16_is_finite_and_near(changes: dict[str, Any]) -> None:
    reference, tokens = _lm(torch.float64, **changes), _tokens()
    model = _lm(torch.bfloat16, **changes)
    model.load_state_dict(reference.state_dict())
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert (logits - reference(tokens)).abs().mean() < 0.05
    loss = model.loss(tokens, tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_trains_float32_parameters() -> None:
    model, tokens = _lm(), _tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, 1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(tokens, tokens.roll(-1, 1)).item(), abs=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_state_dict_loads_across_dtypes() -> None:
    model, tokens = _lm(torch.float32), _tokens()
    half, back = _lm(torch.bfloat16), _lm(torch.float64)
    half.load_state_dict(model.state_dict())
    back.load_state_dict(half.state_dict())
    for p, q, r in zip(model.parameters(), half.parameters(), back.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and r.dtype == torch.float64
        assert torch.equal(p.bfloat16(), q) and torch.equal(q.double(), r)
    again = copy.deepcopy(model)
    assert torch.equal(again(tokens), model(tokens))


def test_meta_device_builds_and_fills() -> None:
    model = LongNetLM(LongNetConfig.preset("base"), device="meta")
    assert 80e6 < sum(p.numel() for p in model.parameters()) < 90e6
    nano = LongNetLM(LongNetConfig.preset("nano"), device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    nano.reset_parameters()
    assert nano(_tokens()).isfinite().all()


def test_padding_on_the_right_leaves_the_rest_alone() -> None:
    model, tokens = _lm(torch.float64), _tokens()
    mask = torch.zeros(2, 75, dtype=torch.bool)
    mask[1, 50:] = True
    logits = model(tokens, mask)
    torch.testing.assert_close(logits[1, :50], model(tokens[1:, :50])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[0], model(tokens[:1])[0], rtol=1e-10, atol=1e-10)


def test_bad_inputs_teach() -> None:
    model, tokens = _lm(), _tokens()
    with pytest.raises(ValueError, match=r"tokens has shape \(75,\).*\(B, N\)"):
        model(tokens[0])
    with pytest.raises(TypeError, match=r"torch.int32.*tokens.long"):
        model(tokens.int())
    with pytest.raises(TypeError, match="tokens has type list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"ids 0 to 256.*0 to 255"):
        model(torch.tensor([[0, 256]]))
    with pytest.raises(ValueError, match="ids -1 to 3"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 74\).*\(2, 75\)"):
        model(tokens, torch.zeros(2, 74, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"key_padding_mask has type torch.float32"):
        model(tokens, torch.zeros(2, 75))
    with pytest.raises(ValueError, match="tokens is on meta"):
        model(tokens.to("meta"))
    with pytest.raises(ValueError, match=r"causal=False.*LongNetEncoder"):
        LongNetLM(LongNetConfig.preset("nano", causal=False))
    with pytest.raises(ValueError, match=r"causal=True.*LongNetLM"):
        LongNetEncoder(LongNetConfig.preset("nano"))
    with pytest.raises(TypeError, match="config='nano'"):
        LongNetLM("nano")  # type: ignore[arg-type]


def test_what_padding_embeds_to_reaches_no_gradient() -> None:
    model = _lm(tie_embeddings=False)
    tokens, mask = _tokens(2, 40).clamp(min=1), torch.zeros(2, 40, dtype=torch.bool)
    mask[0, :7] = mask[1, 30:] = True
    tokens = tokens.masked_fill(mask, 0)
    results = []
    for fill in (0.5, torch.nan):
        with torch.no_grad():
            model.embedding.weight[0] = fill
        model.zero_grad()
        loss = model.loss(tokens, tokens.roll(-1, 1), key_padding_mask=mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) and want.any()
