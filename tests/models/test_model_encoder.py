"""LongNetEncoder: padding, both kinds of input, batch norm, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.models import LongNetConfig, LongNetEncoder

LENGTHS = (75, 1, 33)


def _encoder(dtype: torch.dtype | None = torch.float64, **changes: Any) -> LongNetEncoder:
    torch.manual_seed(0)
    return LongNetEncoder(LongNetConfig.preset("nano", causal=False, **changes), dtype=dtype)


def _tokens(batch: int = 3, length: int = 75) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def _mask() -> Tensor:
    return torch.arange(75)[None] >= torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_xpos": False, "use_rel_pos_bias": True}, {"use_rel_pos_bias": True, "kv_heads": 2}]
)
def test_a_row_of_a_padded_batch_is_the_row_alone(norm: str, changes: dict[str, Any]) -> None:
    encoder, tokens = _encoder(norm=norm, **changes), _tokens()
    out = encoder(tokens, _mask())
    for row, length in enumerate(LENGTHS):
        alone = encoder(tokens[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], rtol=1e-10, atol=1e-10)


def test_batch_norm_encoder_does_not_see_padding() -> None:
    """In training mode too, where every norm mixes the tokens of the batch: results, gradients, running statistics."""
    results = []
    for filler, extra in ((0, 0), (255, 0), (7, 20)):
        encoder = _encoder(norm="batch")
        tokens = F.pad(_tokens().masked_fill(_mask(), filler), (0, extra), value=filler)
        mask = F.pad(_mask(), (0, extra), value=True)
        out = encoder(tokens, mask)[~mask]
        out.pow(3).sum().backward()
        gradients = [p.grad for n, p in encoder.named_parameters() if n != "embedding.weight"]
        results.append([out.detach(), *gradients, *encoder.buffers()])
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)


def test_batch_norm_statistics_are_those_of_the_valid_tokens() -> None:
    encoder, mask = _encoder(norm="batch"), _mask()
    valid = encoder.embed(_tokens())[~mask]
    encoder(_tokens(), mask)
    norm = encoder.blocks[0].attention_norm
    torch.testing.assert_close(norm.running_mean, 0.1 * valid.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * valid.var(0))


def test_batch_norm_in_eval_treats_rows_alone() -> None:
    encoder, tokens = _encoder(norm="batch"), _tokens()
    encoder(tokens, _mask())
    encoder.eval()
    out = encoder(tokens, _mask())
    for row, length in enumerate(LENGTHS):
        alone = encoder(tokens[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], rtol=1e-10, atol=1e-10)


def test_checkpointing_moves_running_statistics_once() -> None:
    results = []
    for flag in (False, True):
        encoder = _encoder(norm="batch", gradient_checkpointing=flag)
        encoder(_tokens(), _mask()).pow(3).sum().backward()
        results.append([*(p.grad for p in encoder.parameters()), *encoder.buffers()])
        assert all(getattr(m, "update_statistics", True) for m in encoder.modules())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("changes", [{}, {"use_xpos": False, "use_rel_pos_bias": True}, {"dropout": 0.2}])
def test_every_norm_trains_a_step(norm: str, changes: dict[str, Any]) -> None:
    encoder = _encoder(torch.float32, norm=norm, **changes)
    out = encoder(_tokens(), _mask())
    out[~_mask()].pow(3).mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_both_sides_are_seen() -> None:
    encoder, tokens = _encoder(), _tokens()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    assert not torch.equal(encoder(tokens)[:, 64], encoder(changed)[:, 64])


def test_embeddings_in_place_of_tokens() -> None:
    encoder, tokens = _encoder(), _tokens()
    embeddings = encoder.embed(tokens).detach().requires_grad_()
    out = encoder(embeddings=embeddings, key_padding_mask=_mask())
    assert torch.equal(out, encoder(tokens, _mask()))
    out.pow(3).sum().backward()
    assert embeddings.grad.isfinite().all()
    assert encoder(embeddings=embeddings[:, :0]).shape == (3, 0, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _encoder(torch.float32)(embeddings=torch.randn(1, 5, 32).bfloat16()).isfinite().all()


def test_bfloat16_is_finite() -> None:
    out = _encoder(torch.bfloat16, norm="batch")(_tokens(), _mask())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_bad_inputs_teach() -> None:
    encoder, tokens = _encoder(), _tokens()
    embeddings = torch.zeros(3, 75, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="neither of tokens and embeddings"):
        encoder()
    with pytest.raises(ValueError, match="both of tokens and embeddings"):
        encoder(tokens, embeddings=embeddings)
    with pytest.raises(ValueError, match=r"embeddings has shape \(3, 75, 31\).*dim=32"):
        encoder(embeddings=embeddings[..., 1:])
    with pytest.raises(ValueError, match=r"embeddings has shape \(75, 32\)"):
        encoder(embeddings=embeddings[0])
    with pytest.raises(TypeError, match=r"embeddings has type torch.int64"):
        encoder(embeddings=tokens)
    with pytest.raises(TypeError, match=r"embeddings has dtype torch.float32 and the model torch.float64"):
        encoder(embeddings=embeddings.float())
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        encoder(embeddings=embeddings, key_padding_mask=torch.zeros(3, 74, dtype=torch.bool))
    with pytest.raises(ValueError, match="ids 0 to 300"):
        encoder(torch.tensor([[0, 300]]))


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_embeddings_of_padding_reach_no_gradient(norm: str, fill: float) -> None:
    """Not through norms or projections either, which multiply rows whose gradient is zero."""
    results = []
    for padding in (0.5, fill):
        encoder = _encoder(norm=norm, use_rel_pos_bias=True)
        embeddings = encoder.embed(_tokens()).detach().masked_fill(_mask()[..., None], padding).requires_grad_()
        out = encoder(embeddings=embeddings, key_padding_mask=_mask())
        out[~_mask()].pow(3).sum().backward()
        gradients = [p.grad for n, p in encoder.named_parameters() if n != "embedding.weight"]
        results.append([out.detach()[~_mask()], embeddings.grad, *gradients])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) and want.any()
    assert not results[1][1][_mask()].any()
