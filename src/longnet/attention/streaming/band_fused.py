"""One token by :mod:`longnet.attention.streaming.band_kernels`: two launches for what :mod:`.band_step` computes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from longnet.attention.call import lse_dtype
from longnet.attention.streaming import band_tables
from longnet.attention.streaming.band_tables import BandTables
from longnet.attention.streaming.cache import DilatedCache
from longnet.runtime.triton_support import power_of_two

# What registers and shared memory hold of several programs of an H200's multiprocessor at a time, so that memory never waits.
_WARPS, _STAGES = 4, 3
# Rows, at least, of a product of matrices; elements of keys in a tile, and of products that are summed.
_LEAST_ROWS = 16
_KEYS = 1 << 13
_SUMS = 1 << 12


def fused_band_step(
    query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, scale: float
) -> tuple[Tensor, Tensor]:
    """What :func:`longnet.attention.streaming.band_step.band_step` computes."""
    import triton.language as tl  # the kernels' types; triton is there, or this is not called

    from longnet.attention.streaming.band_kernels import mix_bands_kernel, parts_kernel

    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    (batch, heads, _, dim), tables, kind = query.shape, cache.tables, lse_dtype(query.dtype)
    assert isinstance(tables, BandTables)
    # The query heads of a reader are the rows of a product of matrices; wide numbers are multiplied and summed.
    products = query.dtype.itemsize == 2
    share, d_block = (power_of_two(x, _LEAST_ROWS if products else 1) for x in (tables.share, dim))
    rows = min(64, band_tables.PART, _KEYS // d_block if products else max(1, _SUMS // (share * d_block)))
    options = {
        "SHARE": tables.share, "D": dim, "D_BLOCK": d_block,
        "KIND": tl.float64 if kind == torch.float64 else tl.float32,
    }  # fmt: skip
    parts = query.new_empty(batch * tables.parts * tables.share, dim, dtype=kind)
    part_lse = query.new_empty(batch * tables.parts * tables.share, dtype=kind)
    seen = torch.empty_like(cache.position_tensor)
    out, lse = torch.empty_like(query), query.new_empty(batch, heads, 1, dtype=kind)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        parts_kernel[(batch * tables.parts,)](
            query, key, value, cache.keys, cache.values, parts, part_lse, cache.position_tensor, seen, cache.padding,
            cache.padding if cache.offsets is None else cache.offsets, tables.readers, tables.members,
            tables.part_table, query.stride()[:2], key.stride()[:2], value.stride()[:2], cache.keys.stride(0),
            tables.parts, tables.part_rows // rows, SHARE_BLOCK=share, PRODUCTS=products, BY_ROW=cache.offsets is not None,
            DILATED=cache.pattern.dilated_queries, ROWS=rows, SCALE=scale, num_warps=_WARPS, num_stages=_STAGES, **options,
        )  # fmt: skip
        mix_bands_kernel[(batch * heads,)](
            parts, part_lse, out, lse, cache.position_tensor, seen, tables.of_heads, out.stride()[:2], heads,
            tables.parts, BANDS=tables.bands, PARTS=power_of_two(tables.most_parts, 1), num_warps=4, **options,
        )  # fmt: skip
    return out, lse
