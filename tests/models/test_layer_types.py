"""Models of layers that compute different things: what each computes, and everything else that a model does."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import multiplicity
from stacks import dense_module
from torch import Tensor

from longnet import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.attention.definition import warn_uncovered
from longnet.compat.attention import TORCHSCALE
from longnet.compress import head_importance, least_important, prune_heads
from longnet.geometry import suggest_pattern
from longnet.models.base import LongNetBase
from longnet.models.layer_types import LAYER_TYPES

ALL = LAYER_TYPES
STACKS = [*((one,) for one in ALL), ALL]


def config(layer_types: tuple[str, ...], **changes: Any) -> LongNetConfig:
    layers = max(2, len(layer_types))
    of_layers = {"sliding_window": 9, "stride": 2, "stride_block": 3, "kv_heads": 2, "layers": layers}
    if any(one in ("strided_attention", "full_attention") for one in layer_types):
        of_layers["shift_keys"] = True
    return LongNetConfig.preset("nano", layer_types=layer_types, **of_layers | changes)


def make(layer_types: tuple[str, ...], kind: type[LongNetBase] = LongNetLM, **changes: Any) -> Any:
    """A float64 model whose parameters are all away from their initial zeros and ones."""
    torch.manual_seed(0)
    model = kind(config(layer_types, causal=kind is LongNetLM, **changes), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(length: int = 90, batch: int = 2) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


# What each type is, by the definition's own arguments.
PAPER: dict[str, Any] = {"segment_lengths": (16, 32, 64), "dilation_rates": (1, 2, 4), "head_offsets": "interleaved"}
DEFINED: dict[str, dict[str, Any]] = {
    "dilated_attention": PAPER,
    "shifted_dilated_attention": PAPER | {"segment_offset": 42},
    "sliding_attention": {"segment_lengths": (), "dilation_rates": (), "head_offsets": "interleaved", "window": 9},
    "strided_attention": {
        "segment_lengths": (None,),
        "dilation_rates": (2,),
        "head_offsets": "grouped",
        "window": 9,
        "dilated_queries": False,
        "dilation_block": 3,
        "kv_heads": 2,
    },
    "full_attention": {"segment_lengths": (None,), "dilation_rates": (1,), "head_offsets": "interleaved"},
}


@pytest.mark.parametrize("kind", [LongNetLM, LongNetEncoder])
def test_what_each_type_computes(kind: type[LongNetBase]) -> None:
    model = make(ALL, kind)
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    for name, block, layer in zip(ALL, model.blocks, model.config.layer_attentions(), strict=True):
        defined = dict(DEFINED[name])
        offset = defined.get("segment_offset", 0)
        branches = (defined.pop("segment_lengths"), defined.pop("dilation_rates"))
        table = multiplicity(*branches, 4, 90, model.config.causal, defined.pop("head_offsets"), **defined)
        options = {"heads": 4, "is_causal": model.config.causal, "segment_offset": layer.segment_offset}
        assert torch.equal(torch.tensor(layer.pattern.multiplicity(90, **options)), table.long())
        attention = block.attention
        assert (attention.segment_offset, attention.pattern) == (offset, layer.pattern)
        assert attention.shift_keys == layer.shift_keys == (name in ("strided_attention", "full_attention"))
        scaled = name in ("dilated_attention", "shifted_dilated_attention")
        want = dense_module(attention, x, segment_offset=offset, scale_base=512.0 if scaled else None)
        torch.testing.assert_close(attention(x), want, rtol=1e-10, atol=1e-10)


def test_a_config_repeats_stores_and_survives_json() -> None:
    repeated = config(("sliding_attention", "strided_attention"), layers=6)
    assert repeated.layer_types == ("sliding_attention", "strided_attention") * 3
    for values in (repeated.to_dict(), json.loads(json.dumps(repeated.to_dict()))):
        assert LongNetConfig.from_dict(values) == repeated
    assert copy.deepcopy(repeated) == repeated == pickle.loads(pickle.dumps(repeated))
    assert hash(copy.deepcopy(repeated)) == hash(repeated)
    no_segments = config(("full_attention",), segment_lengths=(), dilation_rates=())
    assert no_segments.segment_lengths == () and LongNetConfig.from_dict(no_segments.to_dict()) == no_segments


def test_a_config_without_layer_types_is_written_as_before() -> None:
    plain = LongNetConfig.preset("nano")
    names = {"layer_types", "sliding_window", "stride", "stride_block", "shift_keys", "far_positions"}
    assert not names & set(plain.to_dict())
    # Nothing that was set is lost.
    other = plain.replace(sliding_window=7)
    assert other.to_dict()["sliding_window"] == 7 and LongNetConfig.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"layer_types": "full_attention"}, TypeError, "layer_types='full_attention' has type str"),
        ({"layer_types": 3}, TypeError, "layer_types=3"),
        ({"layer_types": (None,)}, TypeError, "layer_types holds None"),
        ({"layer_types": ("dense",)}, ValueError, "'dense'.*dilated_attention.*shifted_.*sliding_.*strided_.*full_"),
        ({"layer_types": ("full_attention",) * 2, "layers": 3}, ValueError, "2 entries: .* divides layers=3"),
        ({"layer_types": ()}, ValueError, "0 entries"),
        ({"sliding_window": 0}, ValueError, "sliding_window=0"),
        ({"sliding_window": 2.0}, TypeError, "sliding_window=2.0"),
        ({"sliding_window": True}, TypeError, "sliding_window=True"),
        ({"stride": 0}, ValueError, "stride=0"),
        ({"stride_block": 0}, ValueError, "stride_block=0"),
        ({"shift_keys": 1}, TypeError, "shift_keys=1"),
        ({"shift_keys": True}, ValueError, "shift_keys=True"),
        ({"far_positions": 0}, TypeError, "far_positions=0"),
        (
            {"far_positions": False},
            ValueError,
            "far_positions=False with layers of .*: expected one of .*'full_attention'",
        ),
        (
            {"layer_types": ("full_attention",), "far_positions": False, "use_rel_pos_bias": True},
            ValueError,
            "far_positions=False with use_rel_pos_bias=True",
        ),
        ({"segment_lengths": (), "dilation_rates": ()}, ValueError, r"segment_lengths=\(\)"),
        (
            {"segment_lengths": (), "dilation_rates": (), "layer_types": ("shifted_dilated_attention",)},
            ValueError,
            r"segment_lengths=\(\)",
        ),
        ({"layer_types": ("sliding_attention",), "sliding_window": 1 << 41}, ValueError, f"sliding_window={1 << 41}"),
        ({"layer_types": ("strided_attention",), "stride": 1 << 41}, ValueError, f"stride={1 << 41} "),
        ({"layer_types": ("strided_attention",), "stride_block": 1 << 40}, ValueError, "stride_block="),
    ],
)
def test_what_a_config_refuses(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        LongNetConfig.preset("nano", **changes)


@pytest.mark.parametrize("layer_types", STACKS)
def test_the_future_never_reaches_the_past(layer_types: tuple[str, ...]) -> None:
    model, ids = make(layer_types), tokens()
    with torch.no_grad():
        before = model(ids)
        for cut in (0, 1, 9, 42, 89):
            changed = ids.clone()
            changed[:, cut:] = (ids[:, cut:] + 1) % 256
            after = model(changed)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("layer_types", STACKS)
def test_checkpointing_and_chunks_give_the_same_gradients(layer_types: tuple[str, ...]) -> None:
    ids, grads = tokens(), []
    for changes in ({}, {"gradient_checkpointing": True}, {"feed_forward_chunk": 7}):
        model = make(layer_types, **changes)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        grads.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in grads[1:]:
        for one, want in zip(other, grads[0], strict=True):
            torch.testing.assert_close(one, want, rtol=1e-10, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in grads[0])


@pytest.mark.parametrize("layer_types", STACKS)
def test_a_relative_bias_reaches_as_far_as_the_layer(layer_types: tuple[str, ...]) -> None:
    model = make(layer_types, use_xpos=False, use_rel_pos_bias=True)
    x = torch.randn(1, 90, 32, dtype=torch.float64)
    for block in model.blocks:
        want = dense_module(block.attention, x)
        torch.testing.assert_close(block.attention(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_types", STACKS)
def test_pruned_heads_leave_the_others_where_they_were(layer_types: tuple[str, ...]) -> None:
    model, ids = make(layer_types), tokens()
    pruned = prune_heads(model, {0: [0, 1], 1: [2, 3]})
    handles = []
    for layer, channels in ((0, slice(0, 16)), (1, slice(16, 32))):

        def zero(_: Any, inputs: tuple[Tensor, ...], channels: slice = channels) -> tuple[Tensor, ...]:
            out = inputs[0].clone()
            out[..., channels] = 0.0
            return out, *inputs[1:]

        handles.append(model.blocks[layer].attention.sub_norm.register_forward_pre_hook(zero))
    torch.testing.assert_close(pruned(ids), model(ids), rtol=1e-10, atol=1e-10)
    for handle in handles:
        handle.remove()
    assert pruned.config.layer_types == model.config.layer_types
    scores = head_importance(model, [ids])
    assert scores.isfinite().all() and least_important(model, scores, 0.5)


@pytest.mark.parametrize("layer_types", STACKS)
def test_an_exported_program_gives_the_same(layer_types: tuple[str, ...]) -> None:
    model, ids = make(layer_types), tokens(40)
    program = torch.export.export(model, (ids,), strict=False)
    torch.testing.assert_close(program.module()(ids), model(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_types", STACKS)
def test_a_compiled_model_gives_the_same(layer_types: tuple[str, ...]) -> None:
    model, ids = make(layer_types), tokens(40)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_types", STACKS)
def test_generating_takes_the_likeliest_tokens_of_full_passes(layer_types: tuple[str, ...]) -> None:
    model, ids = make(layer_types), tokens(30)
    result = model.generate(ids, 8, temperature=0)
    for end in range(30, 38):
        assert torch.equal(model(result[:, :end])[:, -1].argmax(-1), result[:, end])


@pytest.mark.parametrize(("before", "after"), list(pairwise([*STACKS, STACKS[0]])))
def test_another_stack_with_the_same_weights(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    wide = {"layers": 5, "shift_keys": False}
    model = make(before, **wide)
    of_layers = {"sliding_window": 5, "stride": 3}
    other = model.with_layer_types(after, **of_layers)
    built = LongNetLM(config(after, **wide | of_layers), dtype=torch.float64).eval()
    built.load_state_dict(model.state_dict())
    assert other.config == built.config and not other.training
    assert torch.equal(other(tokens()), built(tokens()))
    # A copy: what is done to one is not done to the other.
    want = model(tokens())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens()), want)


def test_far_layers_without_positions() -> None:
    model = make(ALL, far_positions=False)
    for name, block, layer in zip(ALL, model.blocks, model.config.layer_attentions(), strict=True):
        far = name in ("strided_attention", "full_attention")
        assert layer.positions is (block.attention.xpos is not None) is not far
    # What such a layer alone finds does not depend on where it stands, but for the order that causality gives.
    lone = make(("full_attention",), layers=1, shift_keys=False, far_positions=False)
    ids = tokens(30)
    shuffled = torch.cat((ids[:, :29].flip(1), ids[:, 29:]), 1)
    torch.testing.assert_close(lone(ids)[:, -1], lone(shuffled)[:, -1], rtol=1e-10, atol=1e-10)
    known = lone.with_layer_types(("full_attention",), far_positions=True)
    assert (known(ids)[:, -1] - known(shuffled)[:, -1]).abs().max() > 1e-3
    # A stream and left padding are what they are with positions.
    result = model.generate(ids, 8, temperature=0)
    for end in range(30, 38):
        assert torch.equal(model(result[:, :end])[:, -1].argmax(-1), result[:, end])


def test_another_stack_of_a_pruned_encoder() -> None:
    model = make(("dilated_attention",), LongNetEncoder)
    pruned = prune_heads(model, {0: [0, 1]})
    other = pruned.with_layer_types(("sliding_attention", "full_attention"), shift_keys=True)
    assert other.config.head_numbers == pruned.config.head_numbers
    built = LongNetEncoder(other.config, dtype=torch.float64).eval()
    built.load_state_dict(pruned.state_dict())
    assert torch.equal(other(tokens()), built(tokens()))


def test_what_another_stack_refuses() -> None:
    model = make(("dilated_attention",))
    with pytest.raises(ValueError, match="dim, norm cannot change with layer_types: expected .*'sliding_window'"):
        model.with_layer_types(("full_attention",), dim=64, norm="rms")
    with pytest.raises(ValueError, match="layer_types holds 'dense'"):
        model.with_layer_types(("dense",))
    with pytest.raises(TypeError, match="sliding_window"):
        model.with_layer_types(("sliding_attention",), sliding_window=2.5)
    model.blocks[1].attention.definition = TORCHSCALE
    with pytest.raises(ValueError, match="layer 1 computes torchscale's attention"):
        model.with_layer_types(("full_attention",))


def test_the_suggested_pattern_fits_dilated_layers() -> None:
    pattern = suggest_pattern(90, 60, heads=4)
    model = make(
        ("shifted_dilated_attention",), segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates
    )
    assert model.blocks[0].attention.segment_offset == 2 * max(pattern.segment_lengths) // 3
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("layer_types", "said"),
    [
        (None, "segment_lengths=.*to no head"),
        (("dilated_attention", "dilated_attention"), "segment_lengths=.*to no head"),
        (("dilated_attention", "shifted_dilated_attention"), "the layers together leave"),
        (("dilated_attention", "sliding_attention"), None),
        (("strided_attention", "sliding_attention"), None),
        (("full_attention", "dilated_attention"), None),
    ],
)
def test_coverage_is_told_once_for_all_layers(layer_types: tuple[str, ...] | None, said: str | None) -> None:
    sparse = LongNetConfig(
        dim=32, heads=2, layers=2, segment_lengths=(32,), dilation_rates=(8,), layer_types=layer_types
    )
    warn_uncovered.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = LongNetLM(sparse)
        model(tokens(40))
        model.new_cache(1)
    told = [str(one.message) for one in found]
    assert len(told) == (said is not None), told
    if said is not None:
        assert told[0].startswith(said.partition("=")[0])


def reference(model: LongNetBase, ids: Tensor) -> Tensor:
    """Hidden states of the stack, its attention by the definition."""
    x = model.embed(ids)
    for block in model.blocks:
        attention = block.attention
        scaled = attention.pattern.window is None and None not in attention.pattern.given_lengths
        scale_base = attention.xpos.scale_base if attention.xpos is not None and scaled else None
        x = x + dense_module(attention, block.attention_norm(x), scale_base=scale_base)
        x = x + block.feed_forward(block.feed_forward_norm(x))
    return model.norm(x)


@st.composite
def configs(draw: st.DrawFn) -> LongNetConfig:
    heads, kv_heads = draw(st.sampled_from([(2, 1), (4, 2), (6, 6), (6, 2)]))
    types = tuple(draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=2)))
    branches = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=3))
    shifts = any(one in ("strided_attention", "full_attention") for one in types)
    use_xpos = draw(st.booleans())
    bias = not use_xpos and draw(st.booleans())
    return LongNetConfig(
        vocab_size=20, dim=heads * 4, heads=heads, kv_heads=kv_heads, ffn_dim=8, layers=2 * len(types),
        segment_lengths=tuple(w for w, _ in branches), dilation_rates=tuple(min(w, r) for w, r in branches),
        layer_types=types, sliding_window=draw(st.sampled_from([1, 2, 17, 100])), stride=draw(st.integers(1, 6)),
        stride_block=draw(st.sampled_from([1, 2, 7])), shift_keys=shifts and draw(st.booleans()),
        use_xpos=use_xpos, use_rel_pos_bias=bias, causal=draw(st.booleans()),
        far_positions=not shifts or bias or draw(st.booleans()),
        norm=draw(st.sampled_from(["layer", "rms"])), head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
    )  # fmt: skip


@given(configs(), st.integers(1, 80), st.integers(0, 99), st.booleans())
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore:.*to no head:UserWarning", "ignore:the layers together leave")
def test_random_stacks(given_config: LongNetConfig, length: int, seed: int, is_pruned: bool) -> None:
    assert LongNetConfig.from_dict(json.loads(json.dumps(given_config.to_dict()))) == given_config
    torch.manual_seed(seed)
    model: Any = (LongNetLM if given_config.causal else LongNetEncoder)(given_config, dtype=torch.float64).eval()
    kv_heads = given_config.kv_heads or given_config.heads
    if is_pruned and kv_heads > 1:
        model = prune_heads(model, {0: range(given_config.heads // kv_heads)})
    ids = torch.randint(20, (2, length))
    with torch.no_grad():
        got = model.hidden(ids) if given_config.causal else model(ids)
        torch.testing.assert_close(got, reference(model, ids), rtol=1e-9, atol=1e-9)
        cut = length // 3
        packed = model.run_blocks(model.embed(ids[:1]), cu_seqlens=(0, cut, length))
        for part in (slice(0, cut), slice(cut, length)):
            torch.testing.assert_close(packed[:, part], reference(model, ids[:1, part]), rtol=1e-9, atol=1e-9)
