"""Masks of dropout, eight numbers of a random generator at a time.

What torch.compile makes of ``torch.rand`` evaluates Philox, a counter-based generator of four words (Salmon et al., 2011), once
for every number and keeps one word of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longnet.runtime.operators import define
from longnet.runtime.triton_internals import Launch
from longnet.runtime.triton_support import HAS_TRITON

# A probability is a multiple of 1 / STEPS.
STEPS = 1 << 16

# Groups of eight of a program.
_WIDTH = 512


def keep_masks(shape: Sequence[int], probability: float, device: torch.device) -> Tensor:
    """What dropout keeps, bool of any shape: False with the probability, to 1 / 131,072. Draws from torch's generator.

    Args:
        device: of a GPU, with triton: see :func:`can_draw`.
    """
    seed = torch.randint(0, 1 << 62, (1,), device=device)
    mask: Tensor = _draw(seed, list(shape), round(probability * STEPS))
    return mask


def can_draw(device: torch.device) -> bool:
    """Whether :func:`keep_masks` works there."""
    return device.type == "cuda" and HAS_TRITON


def _run(seed: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    groups = -(-count // 8)
    bits = torch.empty(groups, dtype=torch.int64, device=seed.device)
    if count:
        with torch.cuda.device_of(seed):
            _launch(groups, threshold, seed.device).run((seed, bits), ())
    return bits.view(torch.bool)[:count].view(shape)


# One entry per size.
@lru_cache(maxsize=512)
def _launch(groups: int, threshold: int, device: torch.device) -> Launch:
    """Launches of one size. Devices have launches of their own."""
    from longnet.nn.kernels import keep_kernel

    return Launch(keep_kernel, -(-groups // _WIDTH), (), (groups, threshold), {"WIDTH": _WIDTH})


def _fake(seed: Tensor, shape: Sequence[int], threshold: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


_draw = define("keep_masks", _run, _fake)
