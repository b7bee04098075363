"""Which tiles the class token attends to, exactly."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from longnet.geometry import Pattern
from longnet.geometry.first_token import first_keys
from longnet.geometry.needed_rows import needed_by_first
from longnet.runtime.autocast import no_autocast
from longnet.runtime.cache import tensor_cache


def first_token_weights(query: Tensor, key: Tensor, times: Tensor) -> Tensor:
    """The weight of every key in the result of the first token, (B, H, N) float32 (float64 for float64); a row sums to 1.

    A key that m branches share counts m times. torchscale's padding never reaches the first token: its heads' offset in a
    branch that selects it is 0, the one remainder that has a key in every slot.

    Args:
        query: (B, H, 1, D), of position 0.
        key: (B, H, N, D), of all positions, or of those of :func:`read_by_first_token`.
        times: their :func:`log_times`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would round scores.
    with no_autocast(query):
        query, key = query.to(dtype) * query.shape[-1] ** -0.5, key.to(dtype)
        scores = (key @ query.transpose(-1, -2))[..., 0]
        return (scores + times).softmax(-1)


# One length is in use at a time.
@tensor_cache(2)
def read_by_first_token(pattern: Pattern, heads: int, length: int, device: torch.device) -> Tensor:
    """The positions whose keys the first token sees in some head, rising, itself among them: no other is ever read."""
    read = torch.zeros(length, dtype=torch.bool, device="cpu")
    for end, step in needed_by_first(pattern, heads, length).runs:
        read[:end:step] = True
    with torch.inference_mode(False):
        return read.nonzero().squeeze(1).to(device)


# One length is in use at a time, by all layers.
@tensor_cache(2)
def log_times(
    pattern: Pattern, heads: int, length: int, device: torch.device, dtype: torch.dtype, some: bool = False
) -> Tensor:
    """Log of how many branches let the first token see a key, (H, N).

    Args:
        some: of the keys of :func:`read_by_first_token` alone.
    """
    with torch.inference_mode(False), torch.no_grad():
        times = torch.zeros(heads, length, device=device, dtype=dtype)
        place = torch.arange(length, device=device)
        # The longest sequence stands for all: a length that torch traces has no value to compare.
        for keys in first_keys(pattern, heads, sys.maxsize):
            times[list(keys.heads)] += (place < keys.end) & (place % keys.step == 0)
        times = times.log_()
        return times[:, read_by_first_token(pattern, heads, length, device)] if some else times
