"""Questions about autocast, on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast rounds to on devices of a type; None where it is off, or where there is none."""
    # torch 2.11 cannot trace the question, and compiles for no device without autocast but meta.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    known = available and device_type != "meta"
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """An operator's inputs have been cast already; inside, float32 means float32."""
    kind = x.device.type
    # torch 2.11 cannot trace the questions, and compiles for no device without autocast.
    if torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
