"""The backends, and the choice of one: ``auto`` logs why one was passed over, a backend asked for by name raises that reason."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from longnet.attention.backends import portable
from longnet.attention.backends.cpu_flash import backend as cpu_flash
from longnet.attention.backends.decomposition import exportable
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.call import AttentionInputs, Gradients, SavedForward
from longnet.attention.operators import register_attention

_log = logging.getLogger("longnet")


class Kernels(Protocol):
    """What a backend's module has: a way to compute a whole pattern, on real tensors.

    ``forward`` gives (out, lse). ``backward`` gives gradients for any out and lse, those of a larger whole too, see
    :mod:`longnet.attention.merge`. ``unsupported_reason`` says what both cannot take.
    """

    def unsupported_reason(self, inputs: AttentionInputs, /) -> str | None: ...

    def forward(self, inputs: AttentionInputs, /) -> tuple[Tensor, Tensor]: ...

    def backward(self, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, /) -> Gradients: ...


class Backend:
    """A backend by name: ``forward`` and ``backward`` of its kernels, and ``run`` and ``run_backward``, the same as operators.

    Args:
        automatic: the device types on which ``"auto"`` considers it, None for all.
    """

    def __init__(self, name: str, kernels: Kernels, automatic: tuple[str, ...] | None = None) -> None:
        self.name, self.kernels, self.automatic = name, kernels, automatic
        run, self.run_backward = register_attention(name.replace(":", "_"), kernels.forward, kernels.backward)
        self.run = exportable(run)


# In order of preference; the last takes everything the library computes.
BACKENDS: tuple[Backend, ...] = (
    Backend("cpu_flash", cpu_flash),
    # Its interpreter on the CPU is for tests: it has to be asked for by name.
    Backend("triton", triton_flash, automatic=("cuda",)),
    Backend("portable", portable),
)

# For debugging, by name alone: a part of a backend that can replace another part.
VARIANTS: tuple[Backend, ...] = (
    Backend("triton:general", triton_flash.General),
    Backend("triton:hopper", triton_flash.Hopper),
)

NAMES = ("auto", *(backend.name for backend in (*BACKENDS, *VARIANTS)))


def select_backend(name: str, inputs: AttentionInputs) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that can run these inputs.

    Raises:
        ValueError: an unknown name, a named backend that cannot run (with its reason), or no backend that can.
    """
    found = find_backend(name, inputs)
    if isinstance(found, Backend):
        return found
    said = "; ".join(f"{backend_name}: {reason}" for backend_name, reason in found)
    raise ValueError(f"backend={name!r} cannot run these inputs: {said}")


def find_backend(name: str, inputs: AttentionInputs) -> Backend | list[tuple[str, str]]:
    """As :func:`select_backend`, or the reasons, by backend, why none can.

    Raises:
        ValueError: an unknown name.
    """
    reasons: list[tuple[str, str]] = []
    for backend in BACKENDS if name == "auto" else (*BACKENDS, *VARIANTS):
        if name not in ("auto", backend.name):
            continue
        if name == "auto" and backend.automatic is not None and inputs.query.device.type not in backend.automatic:
            continue
        reason = backend.kernels.unsupported_reason(inputs)
        if reason is None:
            if not torch.compiler.is_compiling():
                for passed_over in reasons:
                    _log.debug("backend %s passed over: %s", *passed_over)
            return backend
        reasons.append((backend.name, reason))
    if not reasons:
        raise ValueError(f"backend={name!r} is unknown: expected one of {NAMES}")
    return reasons
