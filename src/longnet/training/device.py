"""The device and the dtype that settings name, checked on this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def resolve_device(device: str, dtype: str) -> torch.device:
    """The torch device of a setting, checked together with the dtype.

    Raises:
        ValueError: an unknown device, one that this machine lacks, or a dtype that it does not train in.
    """
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        chosen = torch.device(kind)
    else:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"device={device!r} cannot be used: {reason}") from None
    if dtype == "float16" and chosen.type != "cuda":
        raise ValueError(
            f"dtype='float16' on device={chosen.type!r}: expected 'bfloat16' or 'float32'. Gradients in float16 need "
            "loss scaling, which exists on CUDA only, and on CPUs float16 is not faster than bfloat16"
        )
    return chosen


def choose_dtype(device: str) -> str:
    """``"bfloat16"`` where the device multiplies it in hardware, else ``"float32"``: what ``--dtype auto`` stands for.

    A CPU without such instructions (AMX or AVX-512 BF16) would be many times slower in it.
    """
    kind = resolve_device(device, "float32").type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities() if kind == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The autocast of the forward pass; none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
