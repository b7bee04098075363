"""One token by :mod:`longnet.attention.streaming.kernels`: two launches for what :mod:`.step` computes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from longnet.attention.backends.triton.backend import LARGEST_HEAD_DIM
from longnet.attention.call import lse_dtype
from longnet.attention.streaming.cache import DilatedCache
from longnet.attention.streaming.tables import StepTables
from longnet.runtime.triton_support import HAS_TRITON, power_of_two

_log = logging.getLogger("longnet")
# Rows of a lane that a program reads at a time and its warps, measured on one H200; programs that share a lane at most.
_ROWS = 256
_WARPS = 8
_MOST_SPLITS = 64
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
    import triton.language as tl  # the kernels' types; triton is there, or this is not called

    from longnet.attention.streaming.kernels import lanes_kernel, mix_kernel

    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, _, dim = query.shape
    assert isinstance(cache.tables, StepTables)
    counts, most = cache.tables.lane_counts, cache.tables.most_rows
    *first_lanes, lanes = accumulate(counts, initial=0)
    splits = min(_MOST_SPLITS, -(-most // _ROWS))
    pattern = (cache.pattern.segment_lengths, cache.pattern.dilation_rates, counts, tuple(first_lanes))
    kind = lse_dtype(query.dtype)
    options = {
        "BRANCHES": len(counts), "BLOCKED": cache.pattern.head_offsets == "blocked", "D": dim,
        "D_BLOCK": power_of_two(dim, 1), "KIND": tl.float64 if kind == torch.float64 else tl.float32,
    }  # fmt: skip
    parts = query.new_empty(batch * lanes * splits, dim, dtype=kind)
    lse = query.new_empty(batch * lanes * splits, dtype=kind)
    seen = torch.empty_like(cache.position_tensor)
    out = torch.empty_like(query)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        lanes_kernel[(batch * lanes * splits,)](
            query, key, value, cache.keys, cache.values, parts, lse, cache.position_tensor, seen, cache.padding,
            cache.tables.first_rows, query.stride()[:2], key.stride()[:2], value.stride()[:2], cache.keys.stride(0),
            heads, heads // cache.kv_heads, lanes, splits, -(-most // (splits * _ROWS)), *pattern,
            ROWS=_ROWS, SCALE=scale, num_warps=_WARPS, **options,
        )  # fmt: skip
        mix_kernel[(batch * heads,)](
            parts, lse, out, cache.position_tensor, seen, out.stride()[:2], heads, lanes, splits, *pattern,
            SPLITS=power_of_two(splits, 1), num_warps=4, **options,
        )  # fmt: skip
    return out
