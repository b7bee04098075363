"""Queries against cached rows: every query sees every row, no causal diagonal. The one place for faster kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention.backends.views import signed
from longnet.attention.call import lse_dtype
from longnet.attention.chunked import Rows
from longnet.runtime.torch_internals import cpu_flash, gpu_flash


def rectangle_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of T queries to n keys each, none masked but the padded ones.

    Args:
        query: (B, Hk * share, T, D), T >= 1; ``share`` neighbouring heads read one key/value head.
        key: (B, Hk, n, D), n >= 1.
        value: (B, Hk, n, D).
        padded: (B, n) bool, True where a key is to be ignored, or None.
        backend: the cache's; ``"portable"`` is plain torch here too, all others take torch's flash kernels where they fit.

    Returns:
        out (B, Hk * share, T, D) in the query's dtype (or that of the lse) and lse (B, Hk * share, T), float32 or float64.
        A query whose keys are all padded has out 0 and lse -inf.
    """
    batch, heads, count, dim = query.shape
    # Without a diagonal it does not matter which query a row is: heads that share keys become more rows.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    if backend == "portable" or not (query.device.type == "cpu" or _fits_gpu_flash(query, padded)):
        out, lse = _by_products(rows, key, value, scale, padded)
    else:
        compute = _by_cpu_flash if query.device.type == "cpu" else _by_gpu_flash
        # The kernels take a scale above 0, so its sign goes into the query.
        out, lse = compute(signed(rows, scale), key, value, abs(scale) or 1.0, padded)
    return out.reshape(batch, heads, count, dim), lse.reshape(batch, heads, count)


def _by_cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    # A last stride other than 1 gives wrong numbers silently.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    mask = None
    if padded is not None:
        # The kernel multiplies padded values by 0, which leaves a NaN.
        key, value = (x.masked_fill(padded[:, None, :, None], 0.0) for x in (key, value))
        bias = torch.zeros_like(padded, dtype=query.dtype).masked_fill_(padded, -torch.inf)
        mask = bias[:, None, None, :].expand(-1, query.shape[1], -1, -1)
    out, lse = cpu_flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if padded is not None:
        # The kernel says 0 for a row without keys.
        lse = lse.masked_fill(padded.all(-1)[:, None, None], -torch.inf)
    return out, lse


def _fits_gpu_flash(query: Tensor, padded: Tensor | None) -> bool:
    """Whether torch's flash attention takes these: half precision, no mask, a GPU of compute capability 8 or more."""
    if query.device.type != "cuda" or padded is not None or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return (
        query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _by_gpu_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert padded is None
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, lse, *_ = gpu_flash(query, key, value, 0.0, False, False, scale=scale)
    return out, lse


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    q, k, v = (x.to(lse_dtype(x.dtype)).flatten(0, 1) for x in (query, key, value))
    padded = None if padded is None else padded.repeat_interleave(heads, 0)
    out, lse = (x.unflatten(0, (-1, heads)) for x in Rows(q, k, v, scale, padded=padded).forward())
    return out, lse
