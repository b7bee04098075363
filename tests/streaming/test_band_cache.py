"""``DilatedCache`` beyond the paper: its room, its grid, its files, and what can be taken back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from band_streams import BandStream, band_streams, by_band_step
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streams import Stream, read

from longnet import DilatedCache, stream_attention
from longnet.attention.streaming import storage
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings("ignore:.*to no head:UserWarning")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def reachable(stream: BandStream, position: int) -> int:
    """(key/value head, band, key) that some query at ``position`` or later may read, of keys before it, all batch rows."""
    pattern = Pattern.compose(*stream.pattern, **stream.beyond).grouped(stream.heads, stream.kv_heads)
    offsets = [stream.offset] * stream.batch if isinstance(stream.offset, int) else stream.offset.tolist()
    total = stream.batch * stream.kv_heads * min(position, stream.window or 0)
    for branch in pattern.branches:
        for offset in offsets:
            origin = branch.origin(offset)
            start = max(0, branch.segment_start(position + origin) - origin)
            kept = {
                (head // stream.group, key)
                for head in range(stream.heads)
                for key in range(start, position)
                if branch.selects(key + origin, pattern.offset(branch, head, stream.heads))
            }
            total += len(kept)
    return total


@given(stream=band_streams(), data=st.data())
@settings(max_examples=80)
def test_the_bytes_in_use_are_those_of_keys_in_reach(stream: BandStream, data: st.DataObject) -> None:
    stream = replace(stream, lead=None, capacity=data.draw(st.sampled_from([None, stream.length])))
    cache, position = stream.cache(), data.draw(st.integers(0, stream.length))
    empty = cache.nbytes_used - 2 * stream.head_dim * 8 * reachable(stream, 0)
    if position:
        read(stream, cache, last=position)
    assert cache.nbytes_used - empty == 2 * stream.head_dim * 8 * reachable(stream, position)
    assert cache.nbytes_used <= cache.nbytes
    assert cache.bounded == (None not in stream.pattern[0])


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("capacity", [1, 7, 24, 50])
def test_a_capacity_has_room_for_its_tokens_on_any_grid(block: int, capacity: int) -> None:
    stream = BandStream(((None, 4),), capacity, kv_heads=4, dilated_queries=False, dilation_block=block)
    most = max(sum((p + c) // block % 4 == 0 for p in range(capacity)) for c in range(40))
    for offset in range(12):
        own = replace(stream, segment_offset=offset, capacity=capacity)
        cache = own.cache()
        assert cache.keys.shape[1] == 4 * most
        before = cache.keys.data_ptr()
        close(read(own, cache), own.expected())
        assert cache.keys.data_ptr() == before


def test_too_many_tokens_for_a_capacity() -> None:
    for branches in (((None, 2),), ((8, 2),)):
        stream = BandStream(branches, 20, kv_heads=2, batch=2, lead=(0, 9), capacity=12)
        cache = stream.cache()
        read(stream, cache, last=10)
        state = cache.state_dict()
        message = "3 tokens at position 10 of a cache with capacity=12: expected at most 2 more"
        with pytest.raises(ValueError, match=message):
            read(stream, cache, first=10, last=13)
        after = cache.state_dict()
        torch.testing.assert_close(after, state, rtol=0, atol=0, equal_nan=True)
        close(read(stream, cache, first=10, last=12), stream.expected()[:, :, 10:12])


def grow_from(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(storage, "_FIRST_ROOM", tokens)


@pytest.mark.parametrize("chunk", [1, 5, 60])
def test_room_doubles_before_it_is_full(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    grow_from(monkeypatch, 4)
    stream = BandStream(
        ((None, 3), (10, 2)), 60, tuple(range(chunk, 60, chunk)), kv_heads=3, group=2, window=7, segment_offset=(5, -3),
        batch=2, lead=(0, 7), dilation_block=2,
    )  # fmt: skip
    cache = stream.cache()
    sizes = [cache.nbytes]
    close(read(stream, cache), stream.expected())
    sizes.append(cache.nbytes)
    assert cache._room == 64 and sizes[0] < sizes[1] and not cache.bounded


def test_growth_that_fails_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_from(monkeypatch, 16)
    stream = BandStream(((None, 3),), 60, kv_heads=3, batch=2, lead=(0, 20))
    cache = stream.cache()
    read(stream, cache, last=14)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "make_layout", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            read(stream, cache, first=14)
    assert (cache.position, cache.padding.tolist(), cache._room) == (14, [0, 14], 16)
    close(read(stream, cache, first=14), stream.expected()[:, :, 14:])


def test_a_captured_cache_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_from(monkeypatch, 16)
    stream = BandStream(((None, 3),), 60, kv_heads=3)
    cache = stream.cache()
    read(stream, cache, last=14)
    cache._captured = True
    read(stream, cache, first=14, last=16)
    with pytest.raises(
        ValueError, match="capacity=None and room for 16 tokens, too few for position 17: .* CUDA graph"
    ):
        read(stream, cache, first=16, last=17)
    copy = cache.clone()
    close(read(stream, copy, first=16), stream.expected()[:, :, 16:])


@given(stream=band_streams(), data=st.data())
@settings(max_examples=80)
def test_a_state_goes_on_in_a_cache_of_any_capacity(stream: BandStream, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, stream.length - 1))
    cache = stream.cache()
    if cut:
        read(stream, cache, last=cut)
    state = cache.state_dict()
    rows = state["keys"].shape[1]
    if "format" in state:
        # Rows of the batch on one grid have the same rows in reach.
        same = isinstance(stream.segment_offset, int)
        in_reach = reachable(stream, cut) // stream.batch
        assert rows == in_reach if same else rows >= in_reach
    loaded = stream.cache(capacity=data.draw(st.sampled_from([None, stream.length, stream.length + 30])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_FIRST_ROOM", 2)
        loaded = stream.cache() if stream.capacity is None else loaded
    loaded.load_state_dict(state)
    assert (loaded.position, loaded.padding.tolist()) == (cut, cache.padding.tolist())
    close(read(stream, loaded, first=cut), stream.expected()[:, :, cut:])


SHIFTED = BandStream(((8, 1), (21, 2)), 60, (20,), batch=2, lead=(0, 9), segment_offset=(4, -3), window=5)


def test_a_file(tmp_path: Any) -> None:
    stream = replace(SHIFTED, branches=((None, 2), (21, 2)), dilation_block=3)
    cache = stream.cache(shift_keys=True)
    read(stream, cache, last=20)
    cache.last_key.normal_()
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    loaded = stream.cache(shift_keys=True, capacity=60)
    state = load_file(tmp_path / "cache.safetensors")
    loaded.load_state_dict(state)
    assert torch.equal(loaded.last_key, cache.last_key)
    close(read(stream, loaded, first=20), stream.expected()[:, :, 20:])
    described = {name: x.tolist() for name, x in state.items() if x.dtype == torch.int64}
    assert described == {
        "format": 2, "segment_lengths": [0, 21], "dilation_rates": [2, 2], "heads": [2, 2], "head_offsets": 0,
        "window": 5, "dilated_queries": 1, "dilation_block": 3, "segment_offset": [4, -3], "offsets": [4, -3],
        "position": 20, "furthest": 20, "padding": [0, 9],
    }  # fmt: skip


def test_files_of_published_patterns_are_what_they_were() -> None:
    stream = Stream(((8, 1), (21, 2)), 60, (20,), batch=2, lead=(0, 9))
    cache = stream.cache()
    read(stream, cache, last=20)
    state = cache.state_dict()
    names = {"keys", "values", "padding", "position", "segment_lengths", "dilation_rates", "heads", "head_offsets"}
    assert set(state) == names and state["keys"].shape == cache.keys.shape
    # On another grid the same pattern needs more, and a cache at 0 takes it over.
    cache.reset()
    cache.set_segment_offset(torch.tensor([0, -9]))
    out = read(stream, cache, last=20)
    moved = cache.state_dict()
    assert int(moved["format"]) == 2
    for loaded in (stream.cache(), cache.clone()):
        loaded.load_state_dict(moved)
        assert loaded.offsets.tolist() == [0, -9]
        rest = read(stream, loaded, first=20)
        want = BandStream(**vars(stream), segment_offset=(0, -9)).expected()
        close(torch.cat((out, rest), 2), want)
        # And an old file sets it back.
        loaded.load_state_dict(state)
        assert loaded.offsets is None
        close(read(stream, loaded, first=20), stream.expected()[:, :, 20:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 6}, r"state\['window'\] is 5: expected this cache's 6"),
        ({"window": None}, r"state\['window'\] is 5: expected this cache's 0"),
        ({"dilated_queries": False}, r"state\['dilated_queries'\] is 1"),
        ({"dilation_block": 2}, r"state\['dilation_block'\] is 1"),
        ({"segment_offset": 3}, r"state\['segment_offset'\] is \[4, -3\]: expected this cache's 3"),
        ({"head_offsets": "grouped"}, r"state\['head_offsets'\] is 0"),
        ({"shift_keys": True}, "state holds .*: expected .*'last_key'"),
        ({"capacity": 19}, r"state\['position'\] is 20: expected at most this cache's capacity=19"),
        ({"dtype": torch.float32}, r"state\['keys'\] has dtype torch.float64"),
    ],
)
def test_a_state_of_another_cache_is_refused(changes: dict[str, Any], message: str) -> None:
    cache, stream = SHIFTED.cache(), replace(SHIFTED)
    read(SHIFTED, cache, last=20)
    with pytest.raises(ValueError, match=message):
        stream.cache(**changes).load_state_dict(cache.state_dict())


def test_corrupted_states_are_refused() -> None:
    cache = SHIFTED.cache()
    read(SHIFTED, cache, last=20)
    good = cache.state_dict()
    old = {name: x for name, x in good.items() if name != "format"}
    for state, message in (
        (old, "state holds .*: expected .*'format'"),
        ({**good, "format": torch.tensor(3)}, r"state\['format'\] is 3: expected this cache's 2"),
        ({**good, "offsets": torch.tensor([4])}, r"state\['offsets'\] has shape \(1,\)"),
        ({**good, "offsets": torch.tensor([4, 2**50])}, "segment_offset holds"),
        ({**good, "keys": good["keys"][:, 1:]}, r"state\['keys'\] has shape"),
        ({**good, "position": torch.tensor(19)}, r"state\['keys'\] has shape"),
        ({**good, "furthest": torch.tensor(19)}, r"state\['furthest'\] is 19: expected at least the position, 20"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(state)
    close(read(SHIFTED, cache, first=20), SHIFTED.expected()[:, :, 20:])


@given(stream=band_streams(), data=st.data())
@settings(max_examples=60)
def test_clones_and_reordered_rows(stream: BandStream, data: st.DataObject) -> None:
    cut, rows = data.draw(st.integers(0, stream.length - 1)), st.integers(0, stream.batch - 1)
    index = torch.tensor(data.draw(st.lists(rows, min_size=stream.batch, max_size=stream.batch)))
    cache, mask = stream.cache(), stream.mask()
    if cut:
        read(stream, cache, last=cut)
    copy = cache.clone()
    copy.reorder(index)
    tail = [x[index][:, :, cut:] for x in stream.tensors()]
    out = stream_attention(*tail, copy, key_padding_mask=None if mask is None else mask[index][:, cut:])
    close(out, stream.expected()[index][:, :, cut:])
    close(read(stream, cache, first=cut), stream.expected()[:, :, cut:])


@pytest.mark.parametrize("made_with", [0, 7])
def test_reset_goes_back_to_the_grid_of_the_start(made_with: int) -> None:
    stream = replace(SHIFTED, segment_offset=made_with)
    cache = stream.cache(shift_keys=True)
    cache.set_segment_offset(torch.tensor([3, -40]))
    read(stream, cache)
    cache.last_key.fill_(1.0)
    with pytest.raises(ValueError, match="segment_offset=5 for row 0, 60 tokens of which were read with 3: expected"):
        cache.set_segment_offset(5)
    cache.reset()
    assert cache.position == 0 and not cache.last_key.any()
    close(read(stream, cache), stream.expected())


@given(stream=band_streams(), paper=st.booleans())
@settings(max_examples=80)
def test_rows_of_padding_alone_can_still_be_moved(stream: BandStream, paper: bool) -> None:
    """Padding that is longer than a chunk: how long it is, later masks tell."""
    if paper:
        stream = BandStream(((8, 1), (21, 2)), stream.length, stream.cuts, batch=stream.batch, lead=stream.lead)
    stream = replace(stream, lead=stream.lead or (3, 0, 40), segment_offset=0)
    cache, mask, outs, first = stream.cache(), stream.mask(), [], 0
    assert mask is not None
    for last in stream.ends():
        # What a user knows by now: a row without a real token is padded up to here, at least.
        known = mask[:, :last].sum(1)
        cache.set_segment_offset(-known)
        tokens = (x[:, :, first:last] for x in stream.tensors())
        outs.append(stream_attention(*tokens, cache, key_padding_mask=mask[:, first:last]))
        first = last
    out = torch.cat(outs, 2)
    for row, padding in enumerate(mask.sum(1).tolist()):
        alone = [x[row : row + 1, :, padding:] for x in stream.tensors()]
        want = stream.expected_with_lse(alone, key_padding_mask=None)[0]
        close(out[row : row + 1, :, padding:], want)


@pytest.mark.parametrize("beyond", [{}, {"window": 5}])
def test_an_offset_that_is_0_in_all_rows_is_none(beyond: dict[str, Any]) -> None:
    cache = DilatedCache(8, 1, batch_size=2, heads=1, head_dim=2, **beyond)
    cache.set_segment_offset(torch.tensor([0, 4]))
    assert cache.offsets.tolist() == [0, 4] and not cache._is_paper
    cache.set_segment_offset(torch.tensor([0, 0]))
    assert cache.offsets is None and cache._is_paper == (not beyond)


@given(stream=band_streams(), data=st.data(), by_steps=st.booleans())
@settings(max_examples=200)
def test_what_is_still_held_can_be_taken_back(stream: BandStream, data: st.DataObject, by_steps: bool) -> None:
    stream = replace(stream, lead=None)
    last = data.draw(st.integers(1, stream.length))
    back = data.draw(st.integers(max(0, last - 4), last) | st.integers(0, last))
    cache = stream.cache()
    other = [x.clone() for x in stream.tensors()]
    for x in other:
        x[:, :, back:] += 1.0
    read(stream, cache, other, last=last)
    if cache.holds(back):
        cache.moved(back - last)
        if back < stream.length:
            attend = by_band_step if by_steps and not cache._is_paper else stream_attention
            close(read(stream, cache, first=back, attend=attend), stream.expected()[:, :, back:])


@given(stream=band_streams(), moves=st.lists(st.integers(1, 9) | st.sampled_from([-1, -1, -2, -9]), max_size=12))
@settings(max_examples=200)
def test_tokens_can_be_taken_back_again_and_again(stream: BandStream, moves: list[int]) -> None:
    """Tokens that were taken back are written over others, also where a file comes in between."""
    stream = replace(stream, lead=None)
    cache, position, good = stream.cache(), 0, stream.tensors()
    bad, want = [x + 1.0 for x in good], stream.expected()
    for number, move in enumerate(moves):
        end = min(stream.length, max(0, position + move))
        if end < position:
            if cache.holds(end):
                cache.moved(end - position)
                position = end
            continue
        if end == position:
            continue
        if number % 3 == 2:
            # Read what is none of the stream's, if it can be taken back.
            kept = cache.clone()
            stream_attention(*(x[:, :, position:end] for x in bad), cache)
            if cache.holds(position):
                cache.moved(position - end)
            else:
                cache = kept
        else:
            close(stream_attention(*(x[:, :, position:end] for x in good), cache), want[:, :, position:end])
            position = end
        if number % 4 == 3:
            loaded = stream.cache()
            loaded.load_state_dict(cache.state_dict())
            cache = loaded


def test_what_is_held() -> None:
    cache = DilatedCache((), (), window=8, batch_size=1, heads=1, head_dim=2)
    x = torch.zeros(1, 1, 8, 2)
    stream_attention(x, x, x, cache)
    assert all(cache.holds(position) for position in range(9))
    stream_attention(*(x[:, :, :1],) * 3, cache)
    # Token 8 is where token 0 was: gone for queries before 8, no query after reads it.
    assert [position for position in range(10) if cache.holds(position)] == [8, 9]
    endless = DilatedCache(None, 2, batch_size=1, heads=2, head_dim=2)
    stream_attention(*(torch.zeros(1, 2, 30, 2),) * 3, endless)
    assert all(endless.holds(position) for position in range(31))
    shifted = DilatedCache(None, 1, batch_size=1, heads=1, head_dim=2, shift_keys=True)
    stream_attention(x, x, x, shifted)
    assert [position for position in range(9) if shifted.holds(position)] == [8]
    with pytest.raises(ValueError, match="position=9: expected at most the cache's own, 8"):
        shifted.holds(9)


def test_the_last_key_and_its_tokens_are_one() -> None:
    cache = DilatedCache(8, 1, batch_size=2, heads=4, kv_heads=2, head_dim=6, shift_keys=True)
    assert cache.last_key.shape == (2, 2, 1, 3) and not cache.last_key.any()
    plain = DilatedCache(8, 1, batch_size=2, heads=4, kv_heads=2, head_dim=6)
    assert plain.last_key is None and cache.nbytes - plain.nbytes == cache.last_key.nbytes
    q, k = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 3, 6)
    with pytest.raises(KeyboardInterrupt), cache.reading():
        # Before the tokens were read: nothing has happened.
        raise KeyboardInterrupt
    with cache.reading():
        stream_attention(q, k, k, cache)
        cache.last_key.copy_(k[:, :, -1:, 3:])
    copy = cache.clone()
    copy.reorder(torch.tensor([1, 1]))
    assert torch.equal(copy.last_key, k[[1, 1], :, -1:, 3:]) and torch.equal(cache.last_key, k[:, :, -1:, 3:])

    def interrupted() -> None:
        with cache.reading():
            stream_attention(q, k, k, cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="cache was being written at position 6"):
        stream_attention(q, k, k, cache)
    with pytest.raises(ValueError, match="cache was being written"), cache.reading():
        pass
    cache.load_state_dict(copy.state_dict())
    assert cache.position == 3


@pytest.mark.parametrize("last", [22, 31, 45])
def test_a_cache_that_an_exception_left_half_written_refuses_to_go_on(
    monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    cache = SHIFTED.cache()
    read(SHIFTED, cache, last=20)
    before = cache.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(DilatedCache, "moved", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read(SHIFTED, cache, first=20, last=last)
    with pytest.raises(ValueError, match="cache was being written at position 20"):
        read(SHIFTED, cache, first=20)
    cache.load_state_dict(before)
    close(read(SHIFTED, cache, first=20), SHIFTED.expected()[:, :, 20:])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"window": 0}, ValueError, "window=0: expected at least 1"),
        ({"window": True}, TypeError, "window=True has type bool"),
        ({"dilation_block": 1.0}, TypeError, "dilation_block=1.0 has type float"),
        ({"dilated_queries": 1}, TypeError, "dilated_queries=1 has type int"),
        ({"segment_offset": 1.5}, TypeError, "segment_offset=1.5 has type float"),
        ({"segment_offset": torch.zeros(2)}, TypeError, "segment_offset has dtype torch.float32"),
        ({"segment_offset": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(3,\): expected \(B,\) = \(2,\)"),
        ({"segment_offset": torch.tensor([0, -(2**41)])}, ValueError, "segment_offset holds 2199023255552"),
        (
            {"segment_offset": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "expected the cache's device",
        ),
        ({"segment_offset": 2**41}, ValueError, "segment_offset=2199023255552: expected at most"),
        ({"capacity": 0}, ValueError, "capacity=0: expected at least 1"),
        ({"capacity": 2.0}, TypeError, "capacity=2.0 has type float"),
        ({"shift_keys": 1}, TypeError, "shift_keys=1 has type int"),
        ({"segment_lengths": (), "dilation_rates": ()}, ValueError, "are empty and window=None"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"segment_lengths": (8, None), "dilation_rates": (1, 3), "batch_size": 2, "heads": 4, "head_dim": 4}
    with pytest.raises(kind, match=message):
        DilatedCache(**(arguments | changes))
    if "segment_offset" in changes:
        cache = DilatedCache(**arguments)
        with pytest.raises(kind, match=message):
            cache.set_segment_offset(changes["segment_offset"])


def test_a_bad_flag_of_the_lse() -> None:
    cache, x = SHIFTED.cache(), torch.zeros(2, 2, 1, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="return_lse=1 has type int"):
        stream_attention(x, x, x, cache, return_lse=1)
    assert cache.position == 0
