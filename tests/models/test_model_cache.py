"""Reading bit by bit gives what one pass over everything gives, and generating goes on from there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longnet import DilatedAttention, DilatedCache, LongNetConfig, LongNetLM
from longnet.models import LongNetCache
from longnet.models.layer_types import LAYER_TYPES

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


def model(**changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=32,
        dim=16,
        heads=4,
        layers=2,
        ffn_dim=32,
        segment_lengths=(8, 16, 32),
        dilation_rates=(1, 2, 4),
    ).replace(**changes)
    return LongNetLM(config, dtype=torch.float64).eval()


def tokens(batch: int = 2, length: int = 75) -> Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(1))


def read(lm: LongNetLM, ids: Tensor, cuts: list[int], mask: Tensor | None = None) -> tuple[Tensor, LongNetCache]:
    cache, parts, start = lm.new_cache(len(ids)), [], 0
    for stop in [*cuts, ids.shape[1]]:
        part = None if mask is None else mask[:, start:stop]
        parts.append(lm(ids[:, start:stop], part, cache=cache))
        start = stop
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("cuts", [[], [1], [8, 32], [5, 6, 7, 40, 41], list(range(1, 75))])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_xpos": False, "qk_norm": True, "kv_heads": 2},
        {"segment_lengths": (7, 20), "dilation_rates": (2, 3), "head_offsets": "blocked"},
    ],
)
def test_logits_are_those_of_one_pass(cuts: list[int], changes: dict[str, Any]) -> None:
    lm, ids = model(**changes), tokens()
    got, cache = read(lm, ids, cuts)
    torch.testing.assert_close(got, lm(ids).detach(), rtol=1e-10, atol=1e-10)
    assert cache.position == 75


def test_a_left_padded_batch_is_one_pass_with_the_mask() -> None:
    lm, ids = model(), tokens(3)
    mask = torch.arange(75) < torch.tensor([0, 9, 40])[:, None]
    got, _ = read(lm, ids, [4, 20, 21, 50], mask)
    want = lm(ids, mask).detach()
    torch.testing.assert_close(got[~mask], want[~mask], rtol=1e-10, atol=1e-10)


def test_a_cache_is_forked_reordered_saved_and_reset() -> None:
    lm, ids = model(), tokens()
    _, cache = read(lm, ids[:, :50], [13])
    size = cache.nbytes
    fork, other, saved = cache.clone(), lm.new_cache(2), cache.state_dict()
    want = lm(ids).detach()[:, 50:]
    got = lm(ids[:, 50:], cache=cache)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert fork.position == 50 and cache.nbytes == size
    fork.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(lm(ids[:, 50:].flip(0), cache=fork), want.flip(0), rtol=1e-10, atol=1e-10)
    other.load_state_dict(saved)
    torch.testing.assert_close(lm(ids[:, 50:], cache=other), want, rtol=1e-10, atol=1e-10)
    cache.reset()
    torch.testing.assert_close(lm(ids, cache=cache), lm(ids).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", [10**9, 2**31])
def test_far_along_a_stream_the_same_bytes_give_the_same_logits(start: int) -> None:
    """At the beginning of a period nothing is remembered, and positions matter by their difference only."""
    lm, ids = model(use_xpos=True), tokens(batch=1)
    start -= start % 32
    far = lm.new_cache(1)
    far.moved(start)
    near = read(lm, ids, [30])[0]
    parts = [lm(part, cache=far) for part in ids.split(30, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), near, rtol=1e-7, atol=1e-7)
    assert far.position == start + ids.shape[1]


def test_generating_takes_the_likeliest_tokens_of_full_passes() -> None:
    lm, ids = model(), tokens(2, 20)
    result = lm.generate(ids, 30, temperature=0)
    for end in range(20, 50):
        assert torch.equal(lm(result[:, :end])[:, -1].argmax(-1), result[:, end])


def test_a_known_length_needs_no_more_than_it_reads() -> None:
    lm, ids = model(segment_lengths=(8, 2**20, 2**30), dilation_rates=(1, 2, 4)), tokens(1, 30)
    cache = lm.new_cache(1, max_length=30)
    assert cache.nbytes < 100_000
    got = torch.cat([lm(part, cache=cache) for part in ids.split(7, 1)], 1)
    torch.testing.assert_close(got, lm(ids).detach(), rtol=1e-10, atol=1e-10)
    assert lm.generate(ids, 3, temperature=0).shape == (1, 33)


def test_a_cache_follows_autocast() -> None:
    lm, ids = model().float(), tokens(1, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lm.new_cache(1).layers[0].dtype == torch.bfloat16
        assert lm.generate(ids, 3, temperature=0).shape == (1, 23)
    assert lm.new_cache(1).layers[0].dtype == torch.float32


def test_bad_input_teaches_and_changes_nothing() -> None:
    lm, ids = model(), tokens()
    cache = lm.new_cache(2)
    lm(ids[:, :10], cache=cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 0\): expected at least one token"):
        lm(ids[:, :0], cache=cache)
    with pytest.raises(ValueError, match=r"query has shape \(1, .*by the cache"):
        lm(ids[:1], cache=cache)
    with pytest.raises(TypeError, match="cache has type dict"):
        lm(ids, cache={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache has 3 layers and the model 2"):
        lm(ids, cache=model(layers=3).new_cache(2))
    with pytest.raises(ValueError, match="use_rel_pos_bias=True"):
        model(use_rel_pos_bias=True).new_cache(1)
    with pytest.raises(ValueError, match="layers.N. with N below 2"):
        cache.load_state_dict({**before, "layers.2.keys": before["layers.0.keys"]})
    with pytest.raises(ValueError, match="layer 1: "):
        cache.load_state_dict({**before, "layers.1.keys": before["layers.1.keys"][:1]})
    after = cache.state_dict()
    assert cache.position == 10 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def fail_once(module: nn.Module, kind: type[BaseException]) -> None:
    """The module's next call raises; later ones are as ever."""

    def fail(*_: Any) -> None:
        handle.remove()
        raise kind

    handle = module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["blocks.0.feed_forward", "blocks.1", "blocks.1.feed_forward", "norm", "head"])
def test_a_cache_whose_layers_read_in_part_refuses_to_go_on(place: str, kind: type[BaseException]) -> None:
    lm, ids = model(tie_embeddings=False), tokens()
    cache = read(lm, ids[:, :20], [13])[1]
    fork, saved = cache.clone(), cache.state_dict()
    fail_once(lm.get_submodule(place), kind)
    with pytest.raises(kind):
        lm(ids[:, 20:45], cache=cache)
    want = lm(ids).detach()[:, 20:]
    refused = pytest.raises(ValueError, match=r"cache stands at positions \[.*45\] since an exception came")
    with refused:
        lm(ids[:, 20:], cache=cache)
    with refused:
        lm(ids[:, 20:], cache=cache.clone())
    with refused:
        cache.state_dict()
    torch.testing.assert_close(lm(ids[:, 20:], cache=fork), want, rtol=1e-10, atol=1e-10)
    cache.load_state_dict(saved)
    torch.testing.assert_close(lm(ids[:, 20:], cache=cache), want, rtol=1e-10, atol=1e-10)


def test_a_cache_that_no_layer_has_touched_goes_on() -> None:
    lm, ids = model(), tokens()
    cache = read(lm, ids[:, :20], [13])[1]
    fail_once(lm.blocks[0].attention, MemoryError)
    with pytest.raises(MemoryError):
        lm(ids[:, 20:45], cache=cache)
    want = lm(ids).detach()[:, 20:]
    torch.testing.assert_close(lm(ids[:, 20:], cache=cache), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", ["reset", "reorder", "moved"])
def test_a_change_that_reached_some_layers_only_refuses_to_go_on(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = model(), tokens()
    cache = read(lm, ids[:, :20], [])[1]
    arguments = {"reset": (), "reorder": (torch.tensor([1, 0]),), "moved": (1,)}[change]
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], change, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            getattr(cache, change)(*arguments)
    with pytest.raises(ValueError, match="since an exception came while its layers were read or changed"):
        lm(ids[:, 20:], cache=cache)
    cache.reset()
    torch.testing.assert_close(lm(ids, cache=cache), lm(ids).detach(), rtol=1e-10, atol=1e-10)


def test_logits_of_a_cached_read_hold_no_graph() -> None:
    lm, ids = model(), tokens()
    assert not lm(ids, cache=lm.new_cache(2)).requires_grad


LAYERS: dict[str, Any] = {
    "layers": 5,
    "layer_types": LAYER_TYPES,
    "sliding_window": 6,
    "stride": 2,
    "stride_block": 3,
    "kv_heads": 2,
}


@pytest.mark.parametrize("layer_types", [*((one,) for one in LAYER_TYPES), LAYER_TYPES])
@pytest.mark.parametrize("max_length", [None, 75, 500])
@pytest.mark.parametrize("head_numbers", [None, [(0, 1)] + [(0, 1, 2, 3)] * 4])
def test_every_layer_type_is_read_bit_by_bit(
    layer_types: tuple[str, ...], max_length: int | None, head_numbers: Any
) -> None:
    lm, ids = model(**LAYERS | {"layer_types": layer_types, "head_numbers": head_numbers}), tokens()
    cache = lm.new_cache(2, max_length=max_length)
    got = torch.cat([lm(part, cache=cache) for part in ids.split([30, 1, 1, 20, 23], 1)], 1)
    torch.testing.assert_close(got, lm(ids).detach(), rtol=1e-10, atol=1e-10)
    grows = "strided_attention" in layer_types or "full_attention" in layer_types
    assert cache.bounded == (not grows) and 0 < cache.nbytes_used <= cache.nbytes
    if max_length == 75:
        with pytest.raises(ValueError, match="capacity=75"):
            lm(ids[:, :1], cache=cache)


def test_the_grid_stays_where_it_is_in_a_cache_of_a_known_length() -> None:
    """Segments that cannot end before the last token may be shorter, but not begin elsewhere: 10 begins the second one here."""
    changes = {"segment_lengths": (8, 30), "dilation_rates": (1, 2), "layer_types": ("shifted_dilated_attention",)}
    lm, ids = model(**changes), tokens(2, 12)
    for length in (12, 20, 40):
        cache = lm.new_cache(2, max_length=length)
        got = torch.cat([lm(part, cache=cache) for part in ids.split(5, 1)], 1)
        torch.testing.assert_close(got, lm(ids).detach(), rtol=1e-10, atol=1e-10)
        assert [layer.offsets.tolist() for layer in cache.layers] == [[20, 20]] * 2  # type: ignore[union-attr]


def test_a_mixed_cache_is_forked_reordered_and_saved() -> None:
    lm, ids = model(**LAYERS), tokens()
    mask = torch.arange(75) < torch.tensor([9, 0])[:, None]
    cache, other = lm.new_cache(2), lm.new_cache(2)
    lm(ids[:, :50], mask[:, :50], cache=cache)
    want = lm(ids, mask).detach()[:, 50:]
    other.load_state_dict(cache.state_dict())
    for one in (cache.clone(), other):
        torch.testing.assert_close(lm(ids[:, 50:], cache=one), want, rtol=1e-10, atol=1e-10)
    cache.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(lm(ids[:, 50:].flip(0), cache=cache), want.flip(0), rtol=1e-10, atol=1e-10)


def test_far_along_a_stream_of_bounded_layers_nothing_overflows() -> None:
    lm, ids = model(**LAYERS | {"layers": 3, "layer_types": LAYER_TYPES[:3]}), tokens(1, 70)
    start = 32 * (10**9 // 32)
    far = lm.new_cache(1)
    far.moved(start - 64)
    ahead = torch.randint(32, (1, 64), generator=torch.Generator().manual_seed(2))
    got = [lm(part, cache=far) for part in torch.cat((ahead, ids), 1).split(20, 1)]
    want = lm(torch.cat((ahead, ids), 1)).detach()
    # What was before is not remembered here: tokens whose receptive field begins later agree.
    torch.testing.assert_close(torch.cat(got, 1)[:, 128:], want[:, 128:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [0, 9, 21])
def test_shifted_keys_are_read_into_a_cache(padded: int) -> None:
    """The first key of a chunk takes from the last token of the one before, which may be padding."""
    lm, ids = model(**LAYERS | {"layers": 2, "layer_types": LAYER_TYPES[-2:], "shift_keys": True}).double(), tokens()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[1, :padded] = True
    got, cache = read(lm, ids, [20, 21, 22, 50], mask if padded else None)
    want = lm(ids, mask if padded else None).detach()
    torch.testing.assert_close(got[~mask], want[~mask], rtol=1e-10, atol=1e-10)
    other = cache.clone()
    other.reorder(torch.tensor([1, 0]))
    other.load_state_dict(other.state_dict())
    more = tokens(2, 5).flip(1)
    torch.testing.assert_close(lm(more[[1, 0]], cache=other), lm(more, cache=cache)[[1, 0]], rtol=1e-10, atol=1e-10)
    # And what was before matters.
    assert (
        lm(more[:1], cache=read(lm, more[:1], [3])[1]) - lm(more[:1], cache=read(lm, ids[:1, :5], [3])[1])
    ).abs().max() > 1e-6


def test_a_cache_of_another_kind_of_layer_is_refused() -> None:
    module = DilatedAttention(16, 4, (), (), causal=True, window=5)
    x = torch.zeros(1, 3, 16)
    plain: dict[str, Any] = {"batch_size": 1, "heads": 4, "head_dim": 4}
    with pytest.raises(ValueError, match="cache has window=None: expected the module's 5"):
        module(x, cache=DilatedCache(8, 1, **plain))
    with pytest.raises(ValueError, match="cache has shift_keys=True: expected the module's, False"):
        module(x, cache=DilatedCache((), (), window=5, shift_keys=True, **plain))
    with pytest.raises(ValueError, match="cache has dilated_queries=False: expected the module's True"):
        module(x, cache=DilatedCache(8, 1, window=5, dilated_queries=False, **plain))
    with pytest.raises(ValueError, match="segment_offset given with a cache"):
        module(x, cache=DilatedCache((), (), window=5, **plain), segment_offset=3)
    shifted = DilatedAttention(16, 4, 1, 8, causal=True, segment_offset=5)
    with pytest.raises(ValueError, match="cache has segment_offset=0: expected the module's 5"):
        shifted(x, cache=DilatedCache(8, 1, **plain))
