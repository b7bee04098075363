"""``DilatedCache``: what it holds, how large it is, and how it is copied, reordered and saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import branches, relative_error
from safetensors.torch import load_file, save_file
from streams import Stream, read, streams

from longnet import DilatedCache, stream_attention
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


def reachable(stream: Stream) -> int:
    """Positions of one segment that a query can attend to, over branches and distinct (key/value head, selection) pairs."""
    pattern = Pattern.parse(*stream.pattern, stream.head_offsets)
    total = 0
    for branch in pattern.branches:
        kept = {
            (head // stream.group, position)
            for head in range(stream.heads)
            for position in range(branch.segment_length)
            if pattern.selects(branch, head, stream.heads, position)
        }
        total += len(kept)
    return total


@given(stream=streams())
@settings(max_examples=100)
def test_its_size_is_exactly_what_can_be_reached(stream):
    cache = stream.cache()
    exact = 2 * stream.batch * stream.head_dim * cache.keys.element_size() * reachable(stream)
    assert cache.keys.nbytes + cache.values.nbytes == exact
    assert 0 < cache.nbytes - exact <= 4096 * len(stream.branches)
    before = cache.nbytes, cache.keys.data_ptr(), cache.values.data_ptr()
    read(stream, cache)
    assert (cache.nbytes, cache.keys.data_ptr(), cache.values.data_ptr()) == before


def test_its_size_for_the_papers_pattern():
    lengths, rates = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
    cache = DilatedCache(lengths, rates, batch_size=2, heads=16, head_dim=64, dtype=torch.bfloat16)
    exact = 2 * 2 * 2 * 64 * sum(16 * w // r for w, r in zip(lengths, rates, strict=True))
    assert exact < cache.nbytes <= exact + 4096 * 5
    shared = DilatedCache(lengths, rates, batch_size=2, heads=16, head_dim=64, kv_heads=4, dtype=torch.bfloat16)
    # Four query heads read one: they share rows at rate 1 (all), and at rate 2 (two and two).
    assert shared.keys.shape[1] == 2048 * (4 + 8 + 16 + 16 + 16)


def test_a_rate_far_beyond_the_heads_and_a_segment_beyond_all_tokens():
    cache = DilatedCache(2**26, 2**22, batch_size=1, heads=3, head_dim=2)
    assert cache.keys.shape == (1, 3 * 16, 2)
    x = torch.randn(1, 3, 50, 2)
    out = stream_attention(x, x, x, cache)
    # Head j sees position j alone, itself.
    expected = torch.zeros_like(x)
    for head in range(3):
        expected[:, head, head] = x[:, head, head]
    torch.testing.assert_close(out, expected)


@given(stream=streams(), data=st.data())
@settings(max_examples=60)
def test_a_clone_goes_its_own_way(stream, data):
    cut = data.draw(st.integers(0, stream.length - 1))
    cache = stream.cache()
    if cut:
        read(stream, cache, last=cut)
    copy = cache.clone()
    other = [torch.randn_like(x) for x in stream.tensors()]
    read(stream, copy, other, first=cut)
    assert (copy.position, cache.position) == (stream.length, cut)
    assert (int(copy.position_tensor), int(cache.position_tensor)) == (stream.length, cut)
    assert relative_error(read(stream, cache, first=cut), stream.expected()[:, :, cut:]) < 1e-10


def test_a_clone_has_padding_of_its_own():
    stream = Stream(((8, 1), (21, 2)), 30, batch=2, lead=(0, 9))
    cache = stream.cache()
    read(stream, cache.clone())
    assert cache.padding.tolist() == [0, 0]


@given(stream=streams(), data=st.data())
@settings(max_examples=60)
def test_reordered_rows_go_on_as_the_rows_they_were(stream, data):
    cut = data.draw(st.integers(0, stream.length - 1))
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, stream.batch - 1), min_size=stream.batch, max_size=stream.batch))
    )
    cache, mask = stream.cache(), stream.mask()
    if cut:
        read(stream, cache, last=cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longnet.attention.streaming.cache._SLAB", 64)
        cache.reorder(index)
    tail = [x[index][:, :, cut:] for x in stream.tensors()]
    out = stream_attention(*tail, cache, key_padding_mask=None if mask is None else mask[index][:, cut:])
    assert relative_error(out, stream.expected()[index][:, :, cut:]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_cache_goes_on_in_the_middle_of_segments(tmp_path, dtype):
    stream = Stream(((8, 1), (21, 2), (50, 7)), 90, (33, 34, 60), batch=2, group=3, lead=(0, 20), dtype=dtype)
    expected = read(stream, stream.cache())
    cache = stream.cache()
    read(stream, cache, last=33)
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    loaded = stream.cache()
    loaded.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    assert loaded.position == 33
    assert torch.equal(read(stream, loaded, first=33), expected[:, :, 33:])


def test_a_state_is_a_copy_to_come_back_to():
    stream = Stream(((8, 1), (21, 2)), 60, (20,))
    cache = stream.cache()
    read(stream, cache, last=20)
    state = cache.state_dict()
    first = read(stream, cache, first=20)
    cache.load_state_dict(state)
    assert torch.equal(read(stream, cache, first=20), first)


def test_reset_forgets_everything():
    stream = Stream(((8, 1), (21, 2)), 60, (20,), batch=2, lead=(0, 9))
    cache = stream.cache()
    first = read(stream, cache, last=50)
    cache.reset()
    assert (cache.position, int(cache.position_tensor), cache.padding.tolist()) == (0, 0, [0, 0])
    assert torch.equal(read(stream, cache, last=50), first)


def test_inference_mode_may_begin_and_end():
    stream = Stream(((8, 1), (21, 2)), 60, (20,))
    with torch.inference_mode():
        cache = stream.cache()
        out = [read(stream, cache, last=20)]
        copy = cache.clone()
    out.append(read(stream, cache, first=20))
    read(stream, copy, first=20)
    copy.reset()
    assert relative_error(torch.cat(out, 2), stream.expected()) < 1e-10


@given(pattern=branches(), heads=st.integers(1, 12), kind=st.sampled_from(["interleaved", "blocked"]), data=st.data())
def test_every_head_finds_its_rows_and_no_rows_are_anothers(pattern, heads, kind, data):
    kv_heads = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    cache = DilatedCache(
        *zip(*pattern, strict=True), batch_size=1, heads=heads, head_dim=1, kv_heads=kv_heads, head_offsets=kind
    )
    owner: dict[int, tuple[int, int, int]] = {}
    firsts = cache.layout.first_rows()
    for number, branch in enumerate(cache.pattern.branches):
        for head in range(heads):
            offset = cache.pattern.offset(branch, head, heads)
            for row in range(branch.rows(branch.segment_length, offset)):
                position = offset + row * branch.dilation_rate
                mine = (number, head * kv_heads // heads, position)
                assert owner.setdefault(firsts[number][head] + row, mine) == mine
    assert sorted(owner) == list(range(cache.layout.rows))


@pytest.mark.parametrize("kind", [{"window": 32}, {"window": 32, "dilated_queries": False}])
def test_padding_that_is_taken_back_is_forgotten(kind):
    make = lambda: DilatedCache((64,), (2,), **kind, batch_size=2, heads=2, head_dim=8)  # noqa: E731
    x, padding = torch.randn(2, 2, 20, 8), torch.arange(8) < torch.tensor([[8], [3]])
    cache, expected = make(), make()
    stream_attention(*[x[:, :, :8]] * 3, cache, key_padding_mask=padding)
    assert cache.holds(6)
    cache.moved(-2)
    assert cache.padding.tolist() == [6, 3]
    saved = make()
    saved.load_state_dict(cache.state_dict())
    stream_attention(*[x[:, :, :6]] * 3, expected, key_padding_mask=padding[:, :6])
    wanted = stream_attention(*[x[:, :, 8:]] * 3, expected)
    for again in (cache, saved):
        assert torch.equal(stream_attention(*[x[:, :, 8:]] * 3, again), wanted)
