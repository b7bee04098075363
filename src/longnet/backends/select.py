"""Choosing a backend: one predicate each, in two moods. ``auto`` logs why one was passed over, a name raises it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet.backends import cpu_flash, portable, triton_flash
from longnet.backends.decomposition import exportable
from longnet.backends.operators import BackwardFn, ForwardFn, Spec

_log = logging.getLogger("longnet")


@dataclass(frozen=True)
class Backend:
    """A way to compute a whole pattern: ``run`` gives (out, lse), ``why_not`` says what it cannot take.

    ``run_backward`` gives gradients for any out and lse, those of a larger whole too (see :mod:`longnet.mixing`), and takes
    the tensors that ``register_operators`` names. ``forward`` and ``backward`` are the same on real tensors, for use inside
    an operator. ``automatic`` limits the device types on which ``"auto"`` considers it.
    """

    name: str
    why_not: Callable[[str, torch.dtype, int, bool], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Spec], tuple[Tensor, Tensor]]
    run_backward: BackwardFn
    forward: ForwardFn
    backward: BackwardFn
    automatic: tuple[str, ...] | None = None


# In order of preference; the last takes everything the library computes.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu_flash",
        cpu_flash.why_not,
        exportable(cpu_flash.run),
        cpu_flash.run_backward,
        cpu_flash.forward,
        cpu_flash.backward,
    ),
    # Its interpreter on the CPU is for tests: it has to be asked for by name.
    Backend(
        "triton",
        triton_flash.why_not,
        exportable(triton_flash.run),
        triton_flash.run_backward,
        *triton_flash.functions,
        automatic=("cuda",),
    ),
    Backend(
        "portable",
        portable.why_not,
        exportable(portable.run),
        portable.run_backward,
        portable.forward,
        portable.backward,
    ),
)


def select_backend(name: str, device_type: str, dtype: torch.dtype, head_dim: int, has_bias: bool) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that can run such inputs.

    Raises:
        ValueError: an unknown name, a named backend that cannot run (with its reason), or no backend that can.
    """
    reasons: list[tuple[str, str]] = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        if name == "auto" and backend.automatic is not None and device_type not in backend.automatic:
            continue
        reason = backend.why_not(device_type, dtype, head_dim, has_bias)
        if reason is None:
            if not torch.compiler.is_compiling():
                for passed_over in reasons:
                    _log.debug("backend %s passed over: %s", *passed_over)
            return backend
        reasons.append((backend.name, reason))
    if not reasons:
        names = ("auto", *(backend.name for backend in BACKENDS))
        raise ValueError(f"backend={name!r} is unknown: expected one of {names}")
    said = "; ".join(f"{backend_name}: {reason}" for backend_name, reason in reasons)
    raise ValueError(f"backend={name!r} cannot run these inputs: {said}")
