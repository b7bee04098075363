"""``stream_attention`` beyond the paper: however a stream is cut, its rows are those of the definition over everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from band_streams import BandStream, band_streams, by_band_step
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import relative_error
from streams import read
from test_stream_attention import _Count
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet import DilatedCache, dilated_attention, stream_attention
from longnet.attention.backends import Backend, find_backend, select_backend
from longnet.attention.call import AttentionInputs
from longnet.attention.streaming import band_chunk, band_step

pytestmark = pytest.mark.filterwarnings("ignore:.*to no head:UserWarning")


@given(stream=band_streams())
@settings(max_examples=300)
def test_any_split_gives_the_rows_of_one_call(stream: BandStream) -> None:
    cache = stream.cache()

    def attend(*tensors: torch.Tensor, key_padding_mask: torch.Tensor | None) -> torch.Tensor:
        out, lse = stream_attention(*tensors, key_padding_mask=key_padding_mask, return_lse=True)
        return torch.cat((out, lse.unsqueeze(-1)), -1)

    got, (out, lse) = read(stream, cache, attend=attend), stream.expected_with_lse()
    torch.testing.assert_close(got[..., :-1], out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[..., -1], lse, rtol=1e-10, atol=1e-10)
    assert cache.position == int(cache.position_tensor) == stream.length
    assert cache.nbytes_used <= cache.nbytes


@given(stream=band_streams(), data=st.data(), all_rows=st.booleans())
@settings(max_examples=150)
def test_steps_give_the_rows_of_one_call(stream: BandStream, data: st.DataObject, all_rows: bool) -> None:
    """A chunk, then single tokens to the end; with ``all_rows`` by the shapes of devices with launches."""
    prompt = data.draw(st.integers(0, stream.length - 1))
    cache, expected = stream.cache(), stream.expected()
    before = [read(stream, cache, last=prompt)] if prompt else []
    with pytest.MonkeyPatch.context() as patch:
        if all_rows:
            patch.setattr(band_step, "_reads_few", lambda _: False)
        out = torch.cat([*before, read(stream, cache, first=prompt, attend=by_band_step)], 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@given(stream=band_streams(), scale=st.sampled_from([0.7, -0.3, 0.0]))
@settings(max_examples=40)
def test_any_scale(stream: BandStream, scale: float) -> None:
    cache = stream.cache()
    out = read(stream, cache, attend=lambda *x, **more: stream_attention(*x, scale=scale, **more))
    torch.testing.assert_close(out, stream.expected_with_lse(scale=scale)[0], rtol=1e-10, atol=1e-10)


@given(stream=band_streams())
@settings(max_examples=40)
def test_where_no_kernels_take_a_grid_for_each_row(stream: BandStream) -> None:
    def find(name: str, inputs: AttentionInputs) -> Backend | list[tuple[str, str]]:
        return [(name, "a grid for each row")] if inputs.offsets is not None else find_backend(name, inputs)

    def select(name: str, inputs: AttentionInputs) -> Backend:
        assert inputs.offsets is None
        return select_backend(name, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band_chunk, "find_backend", find)
        patch.setattr(band_chunk, "select_backend", select)
        torch.testing.assert_close(read(stream, stream.cache()), stream.expected(), rtol=1e-10, atol=1e-10)


@given(stream=band_streams(), pruned=st.integers(0, 5))
@settings(max_examples=60)
def test_pruned_heads_stay_what_they_were(stream: BandStream, pruned: int) -> None:
    kv_heads = [head for head in range(stream.kv_heads) if head != pruned % stream.kv_heads] or [0]
    numbers = tuple(head for kv in kv_heads for head in range(kv * stream.group, (kv + 1) * stream.group))
    query, key, value = stream.tensors()
    kept = [query[:, numbers], key[:, kv_heads], value[:, kv_heads]]
    cache = stream.cache(head_numbers=numbers)
    torch.testing.assert_close(read(stream, cache, kept), stream.expected()[:, numbers], rtol=1e-10, atol=1e-10)


@given(stream=band_streams())
@settings(max_examples=60)
def test_padding_on_the_left_and_its_offset_leave_a_row_as_it_is_alone(stream: BandStream) -> None:
    """Minus a row's padding as its offset, once the first mask has said how much that is."""
    own = stream.segment_offset if isinstance(stream.segment_offset, int) else 7
    stream = replace(stream, lead=stream.lead or (3, 0, 9), segment_offset=own)
    cache, mask = stream.cache(), stream.mask()
    assert mask is not None
    cache.set_segment_offset(own - mask.sum(1))
    out, tensors = read(stream, cache), stream.tensors()
    for row, padding in enumerate(mask.sum(1).tolist()):
        alone = [x[row : row + 1, :, padding:] for x in tensors]
        want = stream.expected_with_lse(alone, key_padding_mask=None, segment_offset=own)[0]
        torch.testing.assert_close(out[row : row + 1, :, padding:], want, rtol=1e-10, atol=1e-10)


@given(stream=band_streams())
@settings(max_examples=60)
def test_what_padding_holds_never_counts(stream: BandStream) -> None:
    stream = replace(stream, lead=stream.lead or (3, 0, 9))
    mask, (query, key, value) = stream.mask(), stream.tensors()
    assert mask is not None
    key, value = (x.masked_fill(mask[:, None, :, None], torch.nan) for x in (key, value))
    out = read(stream, stream.cache(), [query, key, value])
    torch.testing.assert_close(out, stream.expected(), rtol=1e-10, atol=1e-10)


STRIDED = BandStream(
    ((None, 4), (300, 3)), 700, (1, 120, 121, 380, 500), kv_heads=2, group=2, head_dim=16, window=64,
    dilated_queries=False, head_offsets="grouped",
)  # fmt: skip
SHIFTED = replace(STRIDED, branches=((100, 1), (256, 4)), dilated_queries=True, segment_offset=(70, -9), batch=2)


@pytest.mark.parametrize("stream", [STRIDED, SHIFTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_near_one_call(stream: BandStream, dtype: torch.dtype) -> None:
    stream = replace(stream, dtype=dtype, cuts=(*stream.cuts, *range(660, 700)))
    expected, options = stream.expected(), {"is_causal": True, "segment_offset": stream.offset}
    whole = dilated_attention(*stream.tensors(), *stream.pattern, **options, **stream.beyond)
    got = read(stream, stream.cache())
    assert got.dtype == dtype
    assert relative_error(got, expected) < (1e-5 if dtype == torch.float32 else 1.2 * relative_error(whole, expected))


@pytest.mark.parametrize("attend", [stream_attention, by_band_step])
def test_far_positions_are_like_near_ones(attend) -> None:
    """At a multiple of the period, blocks and window included, but for the window's reach back."""
    stream = replace(SHIFTED, branches=((6, 1), (10, 3)), window=None, dilation_block=2, length=47, cuts=(13, 20))
    cache = stream.cache()
    cache.moved(30 * (10**12 + 1))
    # Rows of the segment that is cut by the start: there are none before a stream, here they are padding.
    cache._set_padding(torch.full((2,), cache.position), cache.position)
    torch.testing.assert_close(read(stream, cache, attend=attend), stream.expected(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attend", [stream_attention, by_band_step])
def test_a_key_that_is_out_of_reach_is_gone(attend) -> None:
    stream = BandStream(((8, 2),), 40, (3, *range(6, 40, 5)), kv_heads=2, window=6, dilated_queries=False)
    query, key, value = stream.tensors()
    key[:, :, 2], value[:, :, 2] = torch.nan, torch.nan
    out = read(stream, stream.cache(), [query, key, value], attend=attend)
    torch.testing.assert_close(out[:, :, 11:], stream.expected()[:, :, 11:], rtol=1e-10, atol=1e-10)


VIEWS = (
    "slice",
    "select",
    "view",
    "unsqueeze",
    "expand",
    "transpose",
    "permute",
    "detach",
    "alias",
    "split",
    "as_strided",
)


def work_of(stream: BandStream, cache: DilatedCache) -> int:
    """Elements that operations write while the stream is read."""
    with _Count() as count:
        read(stream, cache)
    return sum(numel for name, numel in count.work if not name.removeprefix("aten.").startswith(VIEWS))


def test_work_does_not_grow_with_what_was_read() -> None:
    """A window and bounded segments: the same operations on as much, wherever the stream stands."""
    stream = BandStream(((16, 1), (64, 4)), 37, (20,), window=10, dilated_queries=False)
    counts = []
    for far in (64, 64 * 10**6):
        cache = stream.cache()
        cache.moved(far)
        cache.keys.fill_(1.0)
        counts.append(work_of(stream, cache))
    assert counts[0] == counts[1] > 0


def test_work_without_end_is_that_of_the_rows_read() -> None:
    """A token of a segment without end costs its N / r rows, whatever the capacity."""
    stream = BandStream(((None, 4),), 1, kv_heads=4, dilated_queries=False, capacity=10**6)
    work = []
    for position in (4000, 8000):
        cache = stream.cache()
        cache.moved(position)
        work.append(work_of(stream, cache))
    assert 1.5 * work[0] < work[1] < 2.2 * work[0]
    # Rows are read once for keys, once for values, and widened or masked a few times.
    assert work[1] < 12 * 2000 * 4 * stream.head_dim


def test_a_step_reads_nothing_on_the_host_and_its_shapes_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph can repeat, heads at unequal steps included."""
    monkeypatch.setattr(band_step, "_reads_few", lambda _: False)
    stream = BandStream(
        ((20, 3), (None, 3)), 1, batch=2, kv_heads=6, group=4, window=5, segment_offset=(3, -8), capacity=90,
        dilation_block=2,
    )  # fmt: skip
    cache, steps, token = stream.cache(), [], stream.tensors()
    assert any(isinstance(block.heads, list) for block in cache.layout.blocks)
    for position in (0, 7, 41):
        cache.moved(position - cache.position)
        with _Names() as names:
            band_step.band_step(*token, cache, 0.5)
        steps.append(names.called)
    assert steps[0] == steps[1] == steps[2]
    # A number of a tensor, places of a mask, a tensor made of a list, and others of no fixed shape.
    asked = ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "unique", "masked_select")
    assert not [name for name, *_ in steps[0] if any(one in name for one in asked)]


class _Names(TorchDispatchMode):
    """Every operation and the shapes that it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = [x.shape for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.called.append((str(func), shapes))
        return result


def test_numbers_of_heads_that_share_rows() -> None:
    cache = DilatedCache(
        None, 4, batch_size=1, heads=8, kv_heads=2, head_dim=2, window=5, dilated_queries=False, capacity=40
    )
    # Interleaved: each key/value head has four query heads of four offsets, which is every key.
    assert cache.keys.shape[1] == 2 * 40 + 2 * 5
    grouped = DilatedCache(
        None, 2, batch_size=1, heads=8, kv_heads=2, head_dim=2, window=5, dilated_queries=False, capacity=40,
        head_offsets="grouped",
    )  # fmt: skip
    assert grouped.keys.shape[1] == 2 * 20 + 2 * 5


@pytest.mark.parametrize("window", [None, 5])
def test_a_stream_runs_on_the_backend_of_its_cache(window: int | None) -> None:
    options: dict[str, Any] = {"batch_size": 1, "heads": 4, "head_dim": 8, "window": window}
    q, k, v = torch.randn(3, 1, 4, 20, 8)
    found = []
    for backend in ("auto", "portable"):
        cache = DilatedCache((8, 16), (1, 2), backend=backend, **options)
        found.append(torch.cat([stream_attention(*(x[:, :, part] for x in (q, k, v)), cache) for part in CUTS], 2))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    refused = DilatedCache((8, 16), (1, 2), backend="triton", **options | {"window": 5})
    with pytest.raises(
        ValueError, match="backend='triton', whose kernels of a single token cannot run: they run on cuda"
    ):
        stream_attention(*(x[:, :, :1] for x in (q, k, v)), refused)
    assert refused.position == 0
    stream_attention(*(x[:, :, :3] for x in (q, k, v)), DilatedCache(8, 1, backend="cpu_flash", **options))
    with pytest.raises(ValueError, match="backend='fast' is unknown: expected one of"):
        DilatedCache(8, 1, backend="fast", batch_size=1, heads=4, head_dim=8)


CUTS = (slice(0, 9), slice(9, 10), slice(10, 20))
