"""Pruned heads: the model gives exactly what it gave with their attention outputs at zero, and goes on like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from longnet import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.compress import head_importance, least_important, prune_heads, quantize
from longnet.models.base import LongNetBase
from longnet.training import load_model, save_model

HEADS = {0: [1], 1: [0, 3]}


def make(kind: type[LongNetBase] = LongNetLM, **changes: Any) -> Any:
    """A float64 model whose parameters are all away from their initial zeros and ones."""
    torch.manual_seed(0)
    model = kind(LongNetConfig.preset("nano", causal=kind is LongNetLM, **changes), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@contextmanager
def zeroed(model: LongNetBase, heads: Mapping[int, Sequence[int]], scale: float = 0.0) -> Iterator[None]:
    """The attention outputs of these heads times ``scale``, before the sub-norm."""
    handles = []
    for layer, numbers in heads.items():
        attention = model.blocks[layer].attention
        gate = torch.ones(attention.heads, dtype=torch.float64)
        gate[list(numbers)] = scale
        channels = gate.repeat_interleave(attention.head_dim)
        handles.append(
            attention.sub_norm.register_forward_pre_hook(lambda _, inputs, c=channels: (inputs[0] * c, *inputs[1:]))
        )
    yield
    for handle in handles:
        handle.remove()


def tokens(length: int = 70, batch: int = 2) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"norm": "rms"},
    "blocked offsets": {"head_offsets": "blocked"},
    "normalised queries": {"qk_norm": True},
    "a relative bias, no bias": {"use_rel_pos_bias": True, "bias": False},
    "one channel a head": {"dim": 4, "use_xpos": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_model_with_these_heads_at_zero(changes: dict[str, Any]) -> None:
    model = make(**changes)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pruned, batch = prune_heads(model, HEADS), tokens()
    with zeroed(model, HEADS):
        expected = model(batch)
    torch.testing.assert_close(pruned(batch), expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(batch), expected, rtol=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    attention, dim = pruned.blocks[1].attention, model.config.head_dim
    assert attention.q_proj.weight.shape == attention.v_proj.weight.shape == (2 * dim, model.config.dim)
    assert attention.out_proj.weight.shape == (model.config.dim, 2 * dim) and attention.heads == 2


def test_gradients_of_what_is_left() -> None:
    model, batch = make(), tokens()
    pruned = prune_heads(model, HEADS)
    loss = pruned.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    with zeroed(model, HEADS):
        expected = model.loss(batch[:, :-1], batch[:, 1:])
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    kept = torch.cat([torch.arange(0, 8), torch.arange(16, 32)])  # heads 0, 2 and 3 of layer 0
    whole, part = model.blocks[0].attention, pruned.blocks[0].attention
    for name in ("q_proj", "k_proj", "v_proj"):
        got, want = getattr(part, name).weight.grad, getattr(whole, name).weight.grad
        torch.testing.assert_close(got, want[kept], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(part.out_proj.weight.grad, whole.out_proj.weight.grad[:, kept], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(pruned.embedding.weight.grad, model.embedding.weight.grad, rtol=1e-9, atol=1e-14)
    assert part.absent.grad.abs().min() > 0


@given(
    numbers=st.lists(st.sets(st.integers(0, 5), max_size=5), min_size=2, max_size=2),
    head_offsets=st.sampled_from(["interleaved", "blocked"]),
)
@settings(max_examples=15, deadline=None)
def test_any_heads(numbers: list[set[int]], head_offsets: str) -> None:
    model = make(dim=24, heads=6, head_offsets=head_offsets, use_xpos=False)
    heads = {layer: sorted(own) for layer, own in enumerate(numbers)}
    pruned, batch = prune_heads(model, heads), tokens()
    with zeroed(model, heads), torch.no_grad():
        torch.testing.assert_close(pruned(batch), model(batch), rtol=1e-10, atol=1e-12)


def test_grouped_query_heads_go_with_their_key_value_head() -> None:
    model, batch = make(kv_heads=2), tokens()
    pruned = prune_heads(model, {0: [0, 1], 1: [2, 3]})
    with zeroed(model, {0: [0, 1], 1: [2, 3]}):
        torch.testing.assert_close(pruned(batch), model(batch), rtol=1e-10, atol=1e-12)
    assert pruned.blocks[0].attention.k_proj.weight.shape[0] == model.config.head_dim
    with pytest.raises(ValueError, match="expected all 2 heads of a key/value head, or none of them"):
        prune_heads(model, {0: [0]})


def test_an_encoder_with_padding() -> None:
    model, batch = make(LongNetEncoder), tokens()
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, 50:] = True
    pruned = prune_heads(model, HEADS)
    with zeroed(model, HEADS):
        expected = model(batch, mask)
    torch.testing.assert_close(pruned(batch, mask)[~mask], expected[~mask], rtol=1e-10, atol=1e-12)


def test_pruned_again_by_the_same_numbers() -> None:
    model, batch = make(), tokens()
    once = prune_heads(model, {0: [0, 2], 1: [3]})
    twice = prune_heads(prune_heads(model, {0: [2]}), {0: [0], 1: [3]})
    assert twice.config == once.config and twice.config.head_numbers == ((1, 3), (0, 1, 2))
    torch.testing.assert_close(twice(batch), once(batch), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"heads\[0\] holds head 2: expected one of the layer's heads, \(1, 3\)"):
        prune_heads(once, {0: [2]})


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_streams_and_generates_as_the_full_call_says(head_offsets: str) -> None:
    pruned, batch = prune_heads(make(head_offsets=head_offsets), HEADS), tokens(130)
    with torch.no_grad():
        expected = pruned(batch)
        cache = pruned.new_cache(2)
        parts = [pruned(batch[:, first:last], cache=cache) for first, last in ((0, 7), (7, 8), (8, 75), (75, 130))]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-12)
        continued = pruned.generate(batch[:, :50], 20, temperature=0)
        assert torch.equal(continued[:, 50:], pruned(continued[:, :-1])[:, 49:].argmax(-1))
    with pytest.raises(ValueError, match="cache is of head_numbers="):
        pruned(batch, cache=make().new_cache(2))


def test_saved_and_read_back(tmp_path: Path) -> None:
    pruned, batch = prune_heads(make().float(), HEADS), tokens()
    save_model(pruned, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head_numbers"] == [[0, 2, 3], [1, 2]]
    again = load_model(tmp_path / "model")
    assert again.config == pruned.config and torch.equal(again(batch), pruned(batch))


def test_trains_compiles_and_is_reset() -> None:
    model, batch = prune_heads(make(gradient_checkpointing=True).float(), HEADS).train(), tokens(41)
    plain = model.loss(batch[:, :-1], batch[:, 1:])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(5):
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < plain - 0.3
    model.reset_parameters()
    assert model.blocks[0].attention.absent.abs().max() == 0


def test_under_autocast_it_stays_close() -> None:
    pruned, batch = prune_heads(make().float(), HEADS), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        low = pruned(batch)
    assert low.dtype == torch.bfloat16
    assert (low.float() - pruned(batch)).norm() < 0.05 * pruned(batch).norm()


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [
        ({2: [0]}, ValueError, "heads holds layer 2: expected 0 to 1"),
        ({0: [4]}, ValueError, r"heads\[0\] holds head 4: expected one of the layer's heads, \(0, 1, 2, 3\)"),
        ({0: [0.5]}, TypeError, r"heads\[0\] holds 0.5 of type float"),
        ({1: [0, 1, 2, 3]}, ValueError, r"heads\[1\]=\[0, 1, 2, 3\] are all heads of the layer"),
    ],
)
def test_heads_that_cannot_be_pruned(heads: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        prune_heads(make(), heads)


def test_models_that_cannot_be_pruned() -> None:
    with pytest.raises(TypeError, match="model has type Linear: expected a LongNetLM or a LongNetEncoder"):
        prune_heads(torch.nn.Linear(2, 2), {})  # type: ignore[type-var]
    with pytest.raises(ValueError, match="norm='batch'"):
        prune_heads(make(LongNetEncoder, norm="batch"), HEADS)
    masked = make()
    prune.l1_unstructured(masked.blocks[0].attention.q_proj, "weight", 0.3)
    with pytest.raises(ValueError, match=r"q_proj .*make other pruning permanent first"):
        prune_heads(masked, HEADS)
    shared = make()
    shared.loss_group = object()
    with pytest.raises(ValueError, match="prune heads before parallelize"):
        prune_heads(shared, HEADS)


def test_quantised_models_cannot_be_pruned() -> None:
    pytest.importorskip("torchao")
    model = make().float()
    quantize(model, "int8wo")
    with pytest.raises(ValueError, match="q_proj is Linear with a Int8Tensor: .*prune heads before quantising"):
        prune_heads(model, HEADS)


def test_importance_is_the_slope_of_the_loss_in_the_gate() -> None:
    model, batch, step = make(), tokens(40, batch=1), 1e-5
    scores = head_importance(model, [batch])
    assert scores.shape == (2, 4) and scores.dtype == torch.float64
    torch.testing.assert_close(scores.norm(dim=1), torch.ones(2, dtype=torch.float64))
    slopes = torch.zeros_like(scores)
    with torch.no_grad():
        for layer in range(2):
            for head in range(4):
                values = []
                for scale in (1 + step, 1 - step):
                    with zeroed(model, {layer: [head]}, scale):
                        values.append(model.loss(batch[:, :-1], batch[:, 1:]))
                slopes[layer, head] = ((values[0] - values[1]) / (2 * step)).abs()
    torch.testing.assert_close(scores, slopes / slopes.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_importance_is_a_mean_over_rows_and_leaves_the_model_alone() -> None:
    model, batch = make(gradient_checkpointing=True).train(), tokens(40, batch=3)
    together = head_importance(model, [batch])
    torch.testing.assert_close(head_importance(model, batch.split(1)), together)
    torch.testing.assert_close(head_importance(model, [batch[:1], batch[1:]]), together)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_importance_by_a_loss_of_ones_own() -> None:
    model, batch = make(LongNetEncoder), tokens()
    scores = head_importance(model, [batch], loss=lambda model, batch: model(batch).square().mean((1, 2)).sum())
    assert scores.isfinite().all()
    with pytest.raises(ValueError, match="loss=None for an encoder"):
        head_importance(model, [batch])
    with pytest.raises(ValueError, match=r"loss\(model, batch\) gave .*expected a scalar"):
        head_importance(model, [batch], loss=lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="batches holds nothing"):
        head_importance(make(), [])
    with pytest.raises(ValueError, match=r"a batch is .*expected \(B, N \+ 1\) token ids"):
        head_importance(make(), [torch.zeros(3)])
    with pytest.raises(TypeError, match="model has type Linear"):
        head_importance(torch.nn.Linear(2, 2), [])  # type: ignore[arg-type]


def test_the_least_important_heads() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.5, 0.15, 0.8, 0.7]], dtype=torch.float64)
    assert least_important(make(), scores, 0.25) == {0: [0], 1: [1]}
    assert least_important(make(), scores, 0.5) == {0: [0, 1, 2], 1: [1]}
    # A layer keeps its last head, whatever the others are worth.
    assert least_important(make(), scores * torch.tensor([[0.01], [1.0]]), 0.5) == {0: [0, 1, 2], 1: [1]}
    # Two query heads a key/value head: (0.3, 1.2) and (0.65, 1.5).
    assert least_important(make(kv_heads=2), scores, 0.5) == {0: [0, 1], 1: [0, 1]}
    pruned = prune_heads(make(), {0: [0], 1: [1]})
    assert head_importance(pruned, [tokens(20)])[0].isnan().tolist() == [True, False, False, False]
    assert least_important(pruned, scores, 0.34) == {0: [1, 2]}
    for bad, message in (
        ((scores[:1], 0.25), "scores has shape"),
        ((scores, 1.0), "fraction=1.0"),
        ((scores, 0.9), "0.9 would"),
    ):
        with pytest.raises(ValueError, match=message):
            least_important(make(), *bad)


def test_unimportant_heads_cost_less_than_important_ones() -> None:
    """On a model that has learnt something: pruning by score loses less than pruning the other way round."""
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano"))
    text = torch.tensor(list(b"".join(b"%d squared is %d. " % (n, n * n) for n in range(400))))
    starts = torch.randint(len(text) - 65, (40, 8), generator=torch.Generator().manual_seed(0))
    batches = [torch.stack([text[int(start) : int(start) + 65] for start in row]) for row in starts]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in batches:
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = head_importance(model, batches[:8])
    losses = [
        prune_heads(model, least_important(model, own, 0.5)).loss(batches[0][:, :-1], batches[0][:, 1:]).item()
        for own in (scores, -scores)
    ]
    assert losses[0] < losses[1]


def test_torchs_own_pruning_of_single_weights(tmp_path: Path) -> None:
    model, batch = make().float(), tokens()
    projections = [
        getattr(block.attention, name) for block in model.blocks for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    for projection in projections:
        prune.l1_unstructured(projection, "weight", amount=0.3)
    masked = model(batch)
    model.loss(batch[:, :-1], batch[:, 1:]).backward()  # masked weights get no gradient
    assert all(p.weight_orig.grad[p.weight_mask == 0].abs().max() == 0 for p in projections)
    for projection in projections:
        prune.remove(projection, "weight")
    zeros = sum(int((projection.weight == 0).sum()) for projection in projections)
    assert zeros == sum(round(0.3 * projection.weight.numel()) for projection in projections)
    torch.testing.assert_close(model(batch), masked)
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(batch), model(batch))
