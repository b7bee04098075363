"""Bad input: an error that names the argument, its value and what was expected, and a cache that is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streams import Stream, read

from longnet import DilatedCache, stream_attention
from longnet.attention.streaming import attend

STREAM = Stream(((8, 1), (20, 3)), 30, (7,), batch=2, kv_heads=2, group=2, lead=(0, 3), dtype=torch.float32)


@pytest.fixture
def cache():
    """A stream in the middle of a segment, and afterwards the check that it still goes on as before."""
    cache = STREAM.cache()
    read(STREAM, cache, last=7)
    yield cache
    assert cache.position == 7
    assert torch.equal(read(STREAM, cache, first=7), read(STREAM, STREAM.cache())[:, :, 7:])


def token(**changes: Any) -> dict[str, Any]:
    shapes = {"query": (2, 4, 5, 4), "key": (2, 2, 5, 4), "value": (2, 2, 5, 4)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


NONE = {name: x[:, :, :0] for name, x in token().items()}
LATE = torch.zeros(2, 5, dtype=torch.bool)
LATE[1, 2] = True

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (NONE, ValueError, r"query has shape \(2, 4, 0, 4\): expected T >= 1"),
    (token(query=[1.0]), TypeError, "query has type list"),
    (token(key=torch.zeros(2, 5, 4)), ValueError, r"key has shape \(2, 5, 4\): expected 4 dimensions"),
    (token(value=torch.zeros(2, 2, 5, 4, dtype=torch.int64)), TypeError, "value has dtype torch.int64"),
    (token(query=torch.zeros(3, 4, 5, 4)), ValueError, r"query has shape .*expected \(B, H, T, D\) = \(2, 4, 5, 4\)"),
    (token(query=torch.zeros(2, 2, 5, 4)), ValueError, r"query has shape .*expected .*\(2, 4, 5, 4\)"),
    (token(key=torch.zeros(2, 4, 5, 4)), ValueError, r"key has shape .*expected \(B, Hk, T, D\) = \(2, 2, 5, 4\)"),
    (token(value=torch.zeros(2, 2, 6, 4)), ValueError, r"value has shape .*\(2, 2, 5, 4\)"),
    (token(key=torch.zeros(2, 2, 5, 8)), ValueError, r"key has shape .*\(2, 2, 5, 4\)"),
    (token(key=torch.zeros(2, 2, 5, 4).double()), ValueError, "key has dtype torch.float64: expected the cache's"),
    (token(key=torch.zeros(2, 2, 5, 4, device="meta")), ValueError, "key is on meta: expected the cache's device cpu"),
    (token(key=torch.zeros(2, 2, 5, 4, requires_grad=True)), ValueError, r"key requires a gradient .*no_grad"),
    (token(scale="1"), TypeError, "scale='1' has type str"),
    (token(scale=float("nan")), ValueError, "scale=nan is not finite"),
    (token(scale=1e60), ValueError, r"scale=1e\+60 is not finite in float32"),
    (token(key_padding_mask=[True]), TypeError, "key_padding_mask has type list"),
    (token(key_padding_mask=torch.zeros(2, 5)), TypeError, "key_padding_mask has dtype torch.float32"),
    (token(key_padding_mask=LATE[:, :4]), ValueError, r"key_padding_mask has shape \(2, 4\): expected \(B, T\)"),
    (token(key_padding_mask=LATE), ValueError, r"key_padding_mask\[1, 2\] is True after a real token"),
    (token(key_padding_mask=LATE.to("meta")), ValueError, "key_padding_mask is on meta"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_chunk_says_why(cache, arguments, kind, message):
    with pytest.raises(kind, match=message):
        stream_attention(cache=cache, **arguments)


def test_a_hole_inside_one_chunk():
    cache = STREAM.cache()
    with pytest.raises(ValueError, match=r"key_padding_mask\[1, 2\] is True after a real token"):
        stream_attention(**token(key_padding_mask=LATE), cache=cache)
    assert (cache.position, cache.padding.tolist()) == (0, [0, 0])


def test_something_else_than_a_cache():
    with pytest.raises(TypeError, match="cache has type dict: expected a longnet.DilatedCache"):
        stream_attention(**token(), cache={})


def test_gradients_are_no_fault_where_none_are_recorded():
    with torch.no_grad():
        out = stream_attention(**token(key=torch.zeros(2, 2, 5, 4, requires_grad=True)), cache=STREAM.cache())
    assert not out.requires_grad


def test_a_chunk_that_runs_out_of_memory_was_not_read(monkeypatch):
    def fail(*_: Any) -> None:
        raise MemoryError

    cache = STREAM.cache()
    monkeypatch.setattr(attend, "attend_chunk", fail)
    with pytest.raises(MemoryError):
        read(STREAM, cache, last=7)
    assert (cache.position, cache.padding.tolist(), cache._most_padding) == (0, [0, 0], 0)


def make(**changes: Any) -> DilatedCache:
    settings = {"segment_lengths": (8, 20), "dilation_rates": (1, 3), "batch_size": 2, "heads": 4, "head_dim": 4}
    return DilatedCache(**(settings | {"kv_heads": 2, "dtype": torch.float32} | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0: expected at least 1"),
        ({"heads": 2.0}, TypeError, "heads=2.0 has type float"),
        ({"head_dim": True}, TypeError, "head_dim=True has type bool"),
        ({"kv_heads": 3}, ValueError, "heads=4 is not divisible by kv_heads=3"),
        ({"dtype": "float32"}, TypeError, "dtype='float32' has type str"),
        ({"dtype": torch.int64}, ValueError, "dtype=torch.int64: expected one of torch.float64"),
        ({"dilation_rates": (1,)}, ValueError, "differ in length"),
        ({"head_offsets": "none"}, ValueError, "head_offsets='none'"),
    ],
)
def test_a_bad_cache_says_why(changes, kind, message):
    with pytest.raises(kind, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        ([0, 1], TypeError, "index has type list"),
        (torch.zeros(2), TypeError, "index has dtype torch.float32"),
        (torch.tensor([0]), ValueError, r"index has shape \(1,\): expected \(B,\) = \(2,\)"),
        (torch.tensor([0, 2]), ValueError, "index holds 2: expected batch rows 0 to 1"),
        (torch.tensor([-1, 0]), ValueError, "index holds -1"),
    ],
)
def test_a_bad_order_says_why(cache, index, kind, message):
    with pytest.raises(kind, match=message):
        cache.reorder(index)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(segment_lengths=(8, 24)), r"state\['segment_lengths'\] is \[8, 24\]: expected this cache's \[8, 20\]"),
        (make(dilation_rates=(1, 2)), "dilation_rates"),
        (make(segment_lengths=8, dilation_rates=1), "segment_lengths"),
        (make(head_offsets="blocked"), "head_offsets"),
        (make(heads=8), r"state\['heads'\] is \[8, 2\]: expected this cache's \[4, 2\]"),
        (make(kv_heads=4), r"state\['heads'\] is \[4, 4\]"),
        (make(batch_size=3), r"state\['keys'\] has shape \(3, "),
        (make(head_dim=8), r"state\['keys'\] has shape"),
        (make(dtype=torch.bfloat16), "has dtype torch.bfloat16: expected this cache's torch.float32"),
    ],
)
def test_a_state_of_another_cache_is_refused(cache, other, message):
    with pytest.raises(ValueError, match=message):
        cache.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"keys": None}, ValueError, "state holds .*: expected .*'keys'"),
        ({"extra": torch.zeros(1)}, ValueError, "state holds .*'extra'"),
        ({"keys": [1.0]}, TypeError, r"state\['keys'\] has type list"),
        ({"values": torch.zeros(2, 3, 4)}, ValueError, r"state\['values'\] has shape \(2, 3, 4\)"),
        ({"values": torch.zeros(2, 2, 4, dtype=torch.float64)}, ValueError, r"state\['values'\] has"),
        ({"position": torch.tensor(-1)}, ValueError, r"state\['position'\] is -1"),
        ({"position": torch.tensor(1.0)}, ValueError, r"state\['position'\] has shape \(\) and dtype torch.float32"),
        ({"position": torch.tensor([1])}, ValueError, r"state\['position'\] has shape \(1,\)"),
        ({"padding": torch.tensor([0])}, ValueError, r"state\['padding'\] has shape \(1,\)"),
        (
            {"padding": torch.tensor([0, 8])},
            ValueError,
            r"state\['padding'\] is \[0, 8\]: expected 0 to the position, 7",
        ),
        ({"padding": torch.tensor([-1, 0])}, ValueError, r"state\['padding'\] is \[-1, 0\]"),
        ({"heads": torch.tensor([4.0, 2.0])}, ValueError, r"state\['heads'\] is"),
    ],
)
def test_a_corrupted_state_is_refused(cache, changes, kind, message):
    state = {name: x for name, x in (cache.state_dict() | changes).items() if x is not None}
    with pytest.raises(kind, match=message):
        cache.load_state_dict(state)


def test_a_state_that_is_no_mapping(cache):
    with pytest.raises(TypeError, match="state has type list"):
        cache.load_state_dict([])


def test_positions_that_no_head_covers_are_told():
    with pytest.warns(UserWarning, match="segment_lengths=\\(30,\\) and dilation_rates=\\(9,\\) with 5 heads"):
        DilatedCache(30, 9, batch_size=1, heads=5, head_dim=4)


# Chunks of the stream that end inside a segment and ones that cross the ends of both branches' segments.
@pytest.mark.parametrize("last", [8, 9, 12, 17, 25])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_a_cache_that_an_exception_left_half_written_refuses_to_go_on(monkeypatch, last, kind):
    """After the rows were written, before they were counted: rows of the segment that ended are gone."""
    cache = STREAM.cache()
    read(STREAM, cache, last=7)
    saved, before = cache.clone(), cache.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(DilatedCache, "moved", lambda *_, **__: (_ for _ in ()).throw(kind))
        with pytest.raises(kind):
            stream_attention(*(x[:, :, 7:last] for x in STREAM.tensors()), cache)
    assert cache.position == 7
    refused = pytest.raises(ValueError, match=r"cache was being written at position 7 when an exception came")
    with refused:
        read(STREAM, cache, first=7)
    with refused:
        cache.state_dict()
    with refused:
        read(STREAM, cache.clone(), first=7)
    expected = read(STREAM, STREAM.cache())[:, :, 7:]
    assert torch.equal(read(STREAM, saved, first=7), expected)
    cache.load_state_dict(before)
    assert torch.equal(read(STREAM, cache, first=7), expected)


def test_a_position_that_was_not_written_to_the_device_is_not_counted(monkeypatch):
    cache = STREAM.cache()
    read(STREAM, cache, last=7)

    class Full(torch.Tensor):
        def fill_(self, *_: Any) -> Any:
            raise MemoryError

    cache.position_tensor = cache.position_tensor.as_subclass(Full)
    with pytest.raises(MemoryError):
        cache.moved(3)
    with pytest.raises(ValueError, match="cache was being written"):
        read(STREAM, cache, first=7)
    cache.position_tensor = cache.position_tensor.as_subclass(torch.Tensor)
    cache.reset()
    assert torch.equal(read(STREAM, cache), read(STREAM, STREAM.cache()))


def test_an_interrupted_reorder_refuses_to_go_on(monkeypatch):
    cache = STREAM.cache()
    read(STREAM, cache, last=7)
    monkeypatch.setattr(cache, "_set_padding", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="cache was being written"):
        read(STREAM, cache, first=7)


def test_a_single_step_that_fails_refuses_to_go_on(monkeypatch):
    """The path of devices with launches: the device may have counted the token."""
    cache = STREAM.cache()
    read(STREAM, cache, last=7)
    monkeypatch.setattr(attend, "fits", lambda _: True)
    monkeypatch.setattr(attend, "fused_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    query, key, value = (x[:, :, 7:8] for x in STREAM.tensors())
    with pytest.raises(KeyboardInterrupt):
        attend._step(query, key, value, cache, 0.5)
    with pytest.raises(ValueError, match="cache was being written"):
        read(STREAM, cache, first=7)


def test_no_more_is_taken_back_than_was_counted():
    cache = STREAM.cache()
    read(STREAM, cache, last=7)
    with pytest.raises(ValueError, match="tokens=-8 at position 7: expected at least -7"):
        cache.moved(-8)
    expected = read(STREAM, STREAM.cache())[:, :, 7:]
    assert cache.position == 7 and torch.equal(read(STREAM, cache, first=7), expected)
