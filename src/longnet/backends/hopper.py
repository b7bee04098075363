"""The Hopper kernels' launches: what they take, and how they are cut.

They serve the Triton backend where they fit (:func:`why_not`), and compute what its portable kernels compute.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.backends.launches import kernel_arguments
from longnet.backends.schedule import Schedule, kept_order
from longnet.backends.tma import VIEWS, descriptors, folds, launch, view_of
from longnet.geometry.nests import Nest

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)

# Rows that a program owns: two warpgroups of 64.
_OWNED = 128

# Measured on one H200: (rows swept at a time, pipeline stages, items of a program in a launch) by kernel and head dimension.
_CUTS = {
    ("forward", 64): (128, 4, 128),
    ("forward", 128): (128, 2, 128),
    ("query", 64): (128, 3, 64),
    ("query", 128): (64, 3, 64),
    ("key_value", 64): (64, 3, 64),
    ("key_value", 128): (64, 2, 64),
}
# The registers of a thread at launch, of which the copying warp gives most to those that compute.
_REGISTERS = 168

# Rates of a nest divide it: no kernel sweeps over fewer rows at a time.
UNIT = 64


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def why_not(tensors: tuple[Tensor, ...], padding: Tensor | None, bias: Tensor | None) -> str | None:
    """Why these kernels cannot run on (query, key, value[, gradient of out]), or None when they can."""
    query = tensors[0]
    if not query.is_cuda or _capability(query.device)[0] != 9:
        return "they need a GPU of compute capability 9 (Hopper)"
    if not _has_gluon():
        return "this triton has no Gluon"
    if query.dtype not in DTYPES:
        return f"they take {' and '.join(map(str, DTYPES))}, not {query.dtype}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"they take head dimensions {HEAD_DIMS}, not {query.shape[-1]}"
    if padding is not None:
        return "they take no padding mask"
    if bias is not None:
        return "they take no relative bias"
    return None


def why_not_nest(tensors: tuple[Tensor, ...], nest: Nest) -> str | None:
    """Why they cannot compute this nest of tensors that they can run on, or None when they can."""
    length = tensors[0].shape[2]
    if len(nest.branches) > VIEWS:
        return f"they take nests of up to {VIEWS} branches, not {len(nest.branches)}"
    coarsest = nest.dilation_rates[-1]
    width = min(nest.segment_lengths[0], length)
    if width < _OWNED // 2 * coarsest:
        return f"segments of {width} tokens at rate {coarsest} are too short for blocks of {_OWNED} rows"
    for x in tensors:
        view = view_of(x)
        if view is None or x.data_ptr() % 16 or view.token * x.element_size() % 16:
            return f"strides {tuple(x.stride())} fit no matrix of tokens"
        if view.tokens % coarsest or view.batch % coarsest or view.head % coarsest:
            return f"the length {length} is no multiple of the rate {coarsest}"
    return None


@lru_cache(maxsize=1024)
def _shape(nest: Nest, length: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(tiles of a segment, the kernels' SHAPE)."""
    width = min(nest.segment_lengths[0], length)
    return kernel_arguments(nest, nest.classes, width, _OWNED)


@dataclass(frozen=True)
class Work:
    """A call's tensors and settings. ``query`` (B, H, N, D); ``key`` and ``value`` (B, Hk, N, D); ``scale`` positive."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    nests: tuple[Nest, ...]
    is_causal: bool
    head_offsets: str

    def _launches(
        self, kernel: str, owned: tuple[Tensor, ...], swept: tuple[Tensor, ...]
    ) -> Iterator[tuple[int, Tensor, dict[int, list[Any]], tuple[Any, ...], dict[str, Any]]]:
        """(programs, their items, descriptors by tensor, shared arguments, options) of every launch."""
        batch, heads, length, dim = self.query.shape
        rows, stages, rounds = _CUTS[kernel, dim]
        for number, nest in enumerate(self.nests):
            tiles, shape = _shape(nest, length)
            rates = nest.dilation_rates
            several = len(rates) > 1
            schedule = Schedule(
                nest, shape, length, heads * batch, _multiprocessors(self.query.device), rounds, _OWNED, rows,
                self.is_causal, kernel == "key_value", self.query.device,
            )  # fmt: skip
            segments = -(-length // nest.segment_lengths[0])
            views = {id(x): descriptors(x, rates, _OWNED) for x in owned}
            views |= {id(x): descriptors(x, rates, rows) for x in swept}
            options = {
                "TILES": tiles, "SHAPE": shape, "D": dim, "M": _OWNED, "N": rows, "WEIGHTED": several,
                "PERIOD": rates[-1] if several else 1, "BLOCKED": self.head_offsets == "blocked",
                "CAUSAL": self.is_causal, "MERGE": number > 0, "STAGES": stages, "num_warps": 4, "maxnreg": _REGISTERS,
            }  # fmt: skip
            for part in kept_order(schedule).split(schedule.per_launch):
                arguments = (len(part), length, heads, heads // self.key.shape[1], self.scale, segments)
                yield min(len(part), schedule.programs), part, views, arguments, options

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Write out like the query and lse (B, H, N) float32."""
        from longnet.backends.kernels.hopper_forward import hopper_forward_kernel

        inputs = (self.query, self.key, self.value)
        for programs, order, views, arguments, options in self._launches("forward", inputs[:1], inputs[1:]):
            tensors = (out, lse, order, *(view for x in inputs for view in views[id(x)]))
            strides = (*folds(inputs), out.stride()[:3], lse.stride())
            launch(hopper_forward_kernel, programs, (*tensors, *strides, *arguments), options)

    def backward(
        self, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        """Write the gradients; those of keys and values by query head, (B, H, N, D). ``delta`` is like ``lse``."""
        from longnet.backends.kernels.hopper_backward import hopper_key_value_kernel, hopper_query_kernel

        queries, keys = (self.query, grad_out), (self.key, self.value)
        for kernel, function, owned, swept, grads in (
            ("key_value", hopper_key_value_kernel, keys, queries, (grad_k, grad_v)),
            ("query", hopper_query_kernel, queries, keys, (grad_q,)),
        ):
            for programs, order, views, arguments, options in self._launches(kernel, owned, swept):
                tensors = (lse, delta, *grads, order, *(view for x in (*queries, *keys) for view in views[id(x)]))
                strides = (*folds((*queries, *keys)), lse.stride(), *(grad.stride()[:3] for grad in grads))
                launch(function, programs, (*tensors, *strides, *arguments), options)
