"""One token by :mod:`longnet.attention.streaming.kernels`: two launches for what :mod:`.step` computes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from longnet.attention.backends.triton.backend import LARGEST_HEAD_DIM
from longnet.attention.call import lse_dtype
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.tables import StepTables
from longnet.geometry import Pattern
from longnet.geometry.pattern import LONGEST_SEGMENT
from longnet.runtime.triton_internals import Launch, Value
from longnet.runtime.triton_support import HAS_TRITON, power_of_two

_log = logging.getLogger("longnet")
# Rows of a lane that a program reads at a time and its warps, measured on one H200; programs that share a lane at most.
_ROWS = 256
_WARPS = 8
_MOST_SPLITS = 64
# Numbers of parts that a program mixes at a time.
_PARTS = 1 << 13
# The backends that these kernels belong to. Hopper GPUs have no others for a single token.
_OWN = ("triton", "triton:general", "triton:hopper")


def fits(cache: DilatedCache) -> bool:
    """Whether the kernels can take the next token of this cache; the log says why not.

    Raises:
        ValueError: they cannot, and the cache's backend asks for them.
    """
    reason = None
    if cache.backend not in ("auto", *_OWN):
        reason = f"backend={cache.backend!r} was asked for"
    elif cache.device.type != "cuda":
        reason = f"they run on cuda tensors, not {cache.device.type}"
    elif not HAS_TRITON:
        reason = "triton is not installed"
    elif cache._is_paper and cache.pattern.head_numbers is not None:
        reason = "they compute offsets from the heads' places, not from head_numbers"
    elif cache.head_dim > LARGEST_HEAD_DIM:
        reason = f"they take head dimensions up to {LARGEST_HEAD_DIM}, not {cache.head_dim}"
    elif not cache.layout.rows:
        reason = "no head selects anything"
    if reason is not None:
        if cache.backend in _OWN:
            raise ValueError(
                f"cache has backend={cache.backend!r}, whose kernels of a single token cannot run: {reason}"
            )
        _log.debug("kernels of a single token passed over: %s", reason)
    return reason is None


def fused_step(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float) -> Tensor:
    """What :func:`longnet.attention.streaming.step.step` computes."""
    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    (_, heads, _, dim), tables, kind = query.shape, cache.tables, lse_dtype(query.dtype)
    assert isinstance(tables, StepTables)
    out = torch.empty_like(query)
    parts_of, (of_lanes, mix) = _launches(
        cache.pattern, _most_splits(cache._whole_pattern), heads, cache.kv_heads, tables.lane_counts, tables.most_rows,
        tuple(query.shape), cache.keys.stride(0), tuple(x.stride()[:2] for x in (query, key, value, out)), scale,
        query.dtype, query.device,
    )  # fmt: skip
    parts, lse = query.new_empty(parts_of, dim, dtype=kind), query.new_empty(parts_of, dtype=kind)
    position, seen = cache.position_tensor, torch.empty_like(cache.position_tensor)
    rows = cache.keys, cache.values
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        of_lanes.run((query, key, value, *rows, parts, lse, position, seen, cache.padding, tables.first_rows))
        mix.run((parts, lse, out, position, seen))
    return out


@lru_cache(maxsize=256)
def _most_splits(pattern: Pattern) -> int:
    """Programs that share a lane at most, with any capacity."""
    most = max(branch.kept(0, LONGEST_SEGMENT) for branch in pattern.branches)
    return min(_MOST_SPLITS, -(-most // _ROWS))


@lru_cache(maxsize=256)
def _launches(
    pattern: Pattern,
    most_splits: int,
    heads: int,
    kv_heads: int,
    counts: tuple[int, ...],
    most: int,
    shape: tuple[int, ...],
    cache_at: int,
    strides: tuple[tuple[int, ...], ...],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, tuple[Launch, Launch]]:
    """(parts of all lanes, the two launches) for tensors of known shapes and strides.

    Args:
        most_splits: programs that share a lane at most, whatever the cache's capacity.
        counts, most: lanes of each branch, and the most rows that one has.
        cache_at, strides: where a batch row of the cache begins, in elements; of query, key, value and out.
    """
    import triton.language as tl  # the kernels' types; triton is there, or this is not called

    from longnet.attention.streaming.kernels import lanes_kernel, mix_kernel

    (batch, *_, dim), (*read, out_at) = shape, strides
    *first_lanes, lanes = accumulate(counts, initial=0)
    splits = min(most_splits, -(-most // _ROWS))
    lengths = tuple(map(Value, pattern.segment_lengths))
    branches = (lengths, pattern.dilation_rates, counts, tuple(first_lanes))
    options = {
        "BRANCHES": len(counts), "BLOCKED": pattern.head_offsets == "blocked", "D": dim, "D_BLOCK": power_of_two(dim, 1),
        "KIND": tl.float64 if lse_dtype(dtype) == torch.float64 else tl.float32,
    }  # fmt: skip
    parts = batch * lanes * splits
    # What follows from a cache's capacity is a value: kernels are the same for all of them.
    of_lanes = Value(lanes), Value(splits)
    sizes = (heads, heads // kv_heads, *of_lanes, Value(-(-most // (splits * _ROWS))), *branches)
    lanes_options = {**options, "ROWS": _ROWS, "SCALE": scale, "num_warps": _WARPS}
    split_block = power_of_two(most_splits, 1)
    parts_block = min(power_of_two(len(counts) * split_block, 1), max(1, _PARTS // power_of_two(dim, 1)))
    mix_options = {**options, "SPLITS": split_block, "PARTS_BLOCK": parts_block, "num_warps": 4}
    return parts, (
        Launch(lanes_kernel, parts, (), (*read, Value(cache_at // dim), *sizes), lanes_options),
        Launch(mix_kernel, batch * heads, (), (out_at, heads, *of_lanes, *branches), mix_options),
    )
