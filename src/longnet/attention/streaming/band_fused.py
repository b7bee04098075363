"""One token by :mod:`longnet.attention.streaming.band_kernels`: two launches for what :mod:`.band_step` computes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from longnet.attention.call import lse_dtype
from longnet.attention.streaming import band_tables
from longnet.attention.streaming.band_tables import BandTables
from longnet.attention.streaming.cache import DilatedCache
from longnet.runtime.triton_internals import Launch, Value
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
    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    (batch, heads, _, dim), tables, kind = query.shape, cache.tables, lse_dtype(query.dtype)
    assert isinstance(tables, BandTables)
    out, lse = torch.empty_like(query), query.new_empty(batch, heads, 1, dtype=kind)
    parts_of, (of_parts, mix) = _launches(
        (tables.parts, tables.part_rows, band_tables.PART, tables.share, tables.bands),
        tuple(query.shape), cache.pattern.dilated_queries, cache.offsets is not None, cache.keys.stride(0),
        tuple(x.stride()[:2] for x in (query, key, value, out)), scale, query.dtype, query.device,
    )  # fmt: skip
    parts, part_lse = query.new_empty(parts_of, dim, dtype=kind), query.new_empty(parts_of, dtype=kind)
    position, seen = cache.position_tensor, torch.empty_like(cache.position_tensor)
    rows = cache.keys, cache.values
    of_rows = cache.padding, cache.padding if cache.offsets is None else cache.offsets
    of_readers = tables.readers, tables.members, tables.part_table
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        of_parts.run((query, key, value, *rows, parts, part_lse, position, seen, *of_rows, *of_readers))
        mix.run((parts, part_lse, out, lse, position, seen, tables.of_heads))
    return out, lse


@lru_cache(maxsize=256)
def _launches(
    table_sizes: tuple[int, ...],
    shape: tuple[int, ...],
    dilated_queries: bool,
    by_row: bool,
    cache_at: int,
    strides: tuple[tuple[int, ...], ...],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, tuple[Launch, Launch]]:
    """(rows of all parts' results, the two launches) for tensors of known shapes and strides.

    Args:
        table_sizes: of :class:`BandTables`, in the order in which they are taken apart below.
        cache_at, strides: of a batch row of the cache; of query, key, value and out.
    """
    import triton.language as tl  # the kernels' types; triton is there, or this is not called

    from longnet.attention.streaming.band_kernels import mix_bands_kernel, parts_kernel

    (batch, heads, _, dim), (*read, out_at) = shape, strides
    parts, part_rows, least, share, bands = table_sizes
    # The query heads of a reader are the rows of a product of matrices; wide numbers are multiplied and summed.
    products = dtype.itemsize == 2
    share_block, d_block = (power_of_two(x, _LEAST_ROWS if products else 1) for x in (share, dim))
    rows = min(64, least, _KEYS // d_block if products else max(1, _SUMS // (share_block * d_block)))
    options = {
        "SHARE": share, "D": dim, "D_BLOCK": d_block,
        "KIND": tl.float64 if lse_dtype(dtype) == torch.float64 else tl.float32,
    }  # fmt: skip
    parts_options = {
        **options, "SHARE_BLOCK": share_block, "PRODUCTS": products, "BY_ROW": by_row, "DILATED": dilated_queries,
        "ROWS": rows, "SCALE": scale, "num_warps": _WARPS, "num_stages": _STAGES,
    }  # fmt: skip
    mix_options = {**options, "BANDS": bands, "PARTS": power_of_two(band_tables.MOST_PARTS, 1), "num_warps": 4}
    return batch * parts * share, (
        Launch(
            parts_kernel,
            batch * parts,
            (),
            (*read, Value(cache_at // dim), Value(parts), Value(part_rows // rows)),
            parts_options,
        ),
        Launch(mix_bands_kernel, batch * heads, (), (out_at, heads, Value(parts)), mix_options),
    )
