"""The kernels of a single token beyond the paper, in Triton's interpreter; and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import interpreted
import pytest
import torch
from band_streams import BandStream, band_streams, by_fused_band_step
from compiled import words_of
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import relative_error
from streams import read

from longnet.attention.streaming import band_tables, fused, storage
from longnet.attention.streaming.band_fused import fused_band_step

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.*to no head:UserWarning"),
]
interpreted_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU: test_stream_device.py")


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Iterator[None]:
    """Several parts, as long segments have, some of several tiles."""
    interpreted.hasten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(band_tables, "PART", 4)
        patch.setattr(band_tables, "MOST_PARTS", 3)
        # Not those that were made before, nor for who comes after.
        patch.setattr(storage, "_band_tables", band_tables.BandTables)
        yield


@interpreted_only
@given(stream=band_streams(longest=40), steps=st.integers(1, 8))
@settings(max_examples=25)
def test_steps_after_a_chunk_give_the_rows_of_one_call(stream: BandStream, steps: int) -> None:
    stream = replace(stream, capacity=stream.length, segment_offset=stream.segment_offset or 5)
    cache, first = stream.cache(), max(0, stream.length - steps)
    if not cache.layout.rows:
        return
    before = [read(stream, cache, last=first)] if first else []
    out = torch.cat([*before, read(stream, cache, first=first, attend=by_fused_band_step)], 2)
    torch.testing.assert_close(out, stream.expected(), rtol=1e-10, atol=1e-10)


STRIDED = BandStream(
    ((None, 2), (40, 3)), 60, kv_heads=2, group=4, head_dim=16, window=12, dilated_queries=False,
    head_offsets="grouped", capacity=60, batch=2, segment_offset=(0, -5), lead=(0, 5),
)  # fmt: skip


# No bfloat16: the interpreter multiplies matrices of it as if they were of integers. test_stream_device.py has it.
@interpreted_only
@pytest.mark.parametrize(
    ("dtype", "group", "allowed"),
    [(torch.float32, 4, 1e-5), (torch.float16, 4, 2e-3), (torch.float16, 1, 2e-3)],
)
def test_half_precision_statistics_are_float32(dtype: torch.dtype, group: int, allowed: float) -> None:
    stream = replace(STRIDED, dtype=dtype, group=group)
    cache = stream.cache()
    read(stream, cache, last=48)
    out = read(stream, cache, first=48, attend=by_fused_band_step)
    assert out.dtype == dtype
    assert relative_error(out, stream.expected()[:, :, 48:]) < allowed


@interpreted_only
def test_the_lse() -> None:
    cache, tensors = STRIDED.cache(), STRIDED.tensors()
    read(STRIDED, cache, last=59)
    token = [x[:, :, 59:] for x in tensors]
    out, lse = fused_band_step(*token, cache, 0.25)
    want = STRIDED.expected_with_lse(scale=0.25)
    torch.testing.assert_close((out, lse), tuple(x[:, :, 59:] for x in want), rtol=1e-10, atol=1e-10)


@interpreted_only
def test_nothing_is_written_past_the_room_of_a_cache() -> None:
    """A graph that is replayed too often: Python hears of it afterwards."""
    cache = replace(STRIDED, length=10, capacity=10, lead=None, segment_offset=0).cache()
    tokens = torch.randn(14, 2, 12, 1, 16, dtype=torch.float64).split((8, 2, 2), dim=2)
    blocks = cache.layout.branches[0][1]
    assert [block.rows for block in blocks] == [5, 5]
    for i in range(14):
        if i == 10:
            full = cache.keys[:, : blocks[-1].first + blocks[-1].size].clone()
        fused_band_step(*(x[i] for x in tokens), cache, 0.25)
    assert torch.equal(cache.keys[:, : full.shape[1]], full) and not full.isnan().any()
    cache.moved(10, on_device=False)
    with pytest.raises(ValueError, match="stands at position 14 and has room for 10 tokens"):
        cache.moved(4, on_device=False)
    with pytest.raises(ValueError, match="cache was being written"):
        cache.state_dict()


def test_the_cpu_takes_the_other_path() -> None:
    assert not fused.fits(STRIDED.cache())


def test_the_kernels_compile() -> None:
    rows = words_of(Path(__file__).parent / "band_step_compile.py")
    cases = [(case, target) for case in ("alone", "shared", "single") for target in ("80", "90")]
    assert [tuple(row[:2]) for row in rows] == cases
    # Products of matrices for 16 bits, no registers in memory anywhere.
    assert all((int(products) > 0) == (case != "single") and spilled == "0" for case, _, products, spilled in rows)
