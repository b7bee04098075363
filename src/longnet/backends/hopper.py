"""The Hopper kernels' launches: what they take, and how they are cut.

They serve the Triton backend where they fit (:func:`why_not`), and compute what its portable kernels compute.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.backends.launches import kernel_arguments
from longnet.backends.schedule import Schedule, kept_order
from longnet.backends.tma import VIEWS, descriptors, folds, is_matrix, launch
from longnet.geometry.nests import Nest

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
# Others are filled up with zeros to the next of these; below, the portable kernels multiply fewer of them.
_LEAST_HEAD_DIM = 33

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

# Rows of a copy that a program writes.
_FILLED_ROWS = 64

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


def why_not(query: Tensor, padding: Tensor | None, bias: Tensor | None) -> str | None:
    """Why these kernels cannot run on such tensors, or None when they can."""
    if not query.is_cuda or _capability(query.device)[0] != 9:
        return "they need a GPU of compute capability 9 (Hopper)"
    if not _has_gluon():
        return "this triton has no Gluon"
    if query.dtype not in DTYPES:
        return f"they take {' and '.join(map(str, DTYPES))}, not {query.dtype}"
    if not _LEAST_HEAD_DIM <= query.shape[-1] <= HEAD_DIMS[-1]:
        return f"they take head dimensions {_LEAST_HEAD_DIM} to {HEAD_DIMS[-1]}, not {query.shape[-1]}"
    if padding is not None:
        return "they take no padding mask"
    if bias is not None:
        return "they take no relative bias"
    return None


def split_nests(nests: Sequence[Nest], length: int) -> tuple[tuple[Nest, ...], dict[Nest, str]]:
    """(nests that these kernels compute, why not the others)."""
    ours: list[Nest] = []
    reasons: dict[Nest, str] = {}
    for nest in nests:
        reason = _why_not_nest(nest, length, _unit(ours))
        if reason is None:
            ours.append(nest)
        else:
            reasons[nest] = reason
    return tuple(ours), reasons


def _why_not_nest(nest: Nest, length: int, unit: int) -> str | None:
    if len(nest.branches) > VIEWS:
        return f"they take nests of up to {VIEWS} branches, not {len(nest.branches)}"
    coarsest = nest.dilation_rates[-1]
    width = min(nest.segment_lengths[0], length)
    if width < _OWNED // 2 * coarsest:
        return f"segments of {width} tokens at rate {coarsest} are too short for blocks of {_OWNED} rows"
    if length % coarsest and math.lcm(unit, coarsest) > length // 8:
        return f"the length {length} is no multiple of the rate {coarsest}, and filling it up would take too much"
    return None


def _unit(nests: Sequence[Nest]) -> int:
    """What the tokens of a tensor have to be a multiple of."""
    return math.lcm(*(nest.dilation_rates[-1] for nest in nests))


@lru_cache(maxsize=1024)
def _shape(nest: Nest, length: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(tiles of a segment, the kernels' SHAPE)."""
    width = min(nest.segment_lengths[0], length)
    return kernel_arguments(nest, nest.classes, width, _OWNED)


@dataclass(frozen=True)
class Work:
    """A call's tensors and settings. ``query`` (B, H, N, D); ``key`` and ``value`` (B, Hk, N, D); ``scale`` positive.

    The tensors are read through copies with zeros at the end of their channels and tokens where the kernels cannot read them
    as they are. What is written has the tensors' own shapes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    nests: tuple[Nest, ...]
    is_causal: bool
    head_offsets: str

    def _readable(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        dim = next(dim for dim in HEAD_DIMS if dim >= self.query.shape[-1])
        unit = _unit(self.nests)
        found = list(tensors)
        by_shape: dict[torch.Size, list[int]] = {}
        for number, x in enumerate(tensors):
            if not is_matrix(x, dim, unit):
                by_shape.setdefault(x.shape, []).append(number)
        for numbers in by_shape.values():
            for number, x in zip(numbers, fill_up([tensors[number] for number in numbers], dim, unit), strict=True):
                found[number] = x
        return tuple(found)

    def _launches(
        self, kernel: str, inputs: tuple[Tensor, ...], owned: slice
    ) -> Iterator[tuple[int, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]]:
        """(programs, their items and the inputs' descriptors, shared arguments, options) of every launch.

        A program owns rows of the inputs in ``owned``, and sweeps over those of the others.
        """
        batch, heads, length, channels = self.query.shape
        dim = inputs[0].shape[-1]
        swept, stages, rounds = _CUTS[kernel, dim]
        rows = [swept] * len(inputs)
        rows[owned] = [_OWNED] * len(rows[owned])
        for number, nest in enumerate(self.nests):
            tiles, shape = _shape(nest, length)
            rates = nest.dilation_rates
            several = len(rates) > 1
            schedule = Schedule(
                nest, shape, length, heads * batch, _multiprocessors(self.query.device), rounds, _OWNED, swept,
                self.is_causal, kernel == "key_value", self.query.device,
            )  # fmt: skip
            segments = -(-length // nest.segment_lengths[0])
            views = [view for x, count in zip(inputs, rows, strict=True) for view in descriptors(x, rates, count)]
            options = {
                "TILES": tiles, "SHAPE": shape, "D": dim, "CHANNELS": channels, "M": _OWNED, "N": swept,
                "WEIGHTED": several, "PERIOD": rates[-1] if several else 1, "BLOCKED": self.head_offsets == "blocked",
                "CAUSAL": self.is_causal, "MERGE": number > 0, "STAGES": stages, "num_warps": 4, "maxnreg": _REGISTERS,
            }  # fmt: skip
            for part in kept_order(schedule).split(schedule.per_launch):
                arguments = (len(part), length, heads, heads // self.key.shape[1], self.scale, segments)
                yield min(len(part), schedule.programs), (part, *views), arguments, options

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Write out like the query and lse (B, H, N) float32."""
        from longnet.backends.kernels.hopper_forward import hopper_forward_kernel

        inputs = self._readable(self.query, self.key, self.value)
        strides = (*folds(inputs), out.stride()[:3], lse.stride())
        for programs, views, arguments, options in self._launches("forward", inputs, slice(0, 1)):
            launch(hopper_forward_kernel, programs, (out, lse, *views, *strides, *arguments), options)

    def backward(
        self, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        """Write the gradients; those of keys and values by query head, (B, H, N, D). ``delta`` is like ``lse``."""
        from longnet.backends.kernels.hopper_backward import hopper_key_value_kernel, hopper_query_kernel

        inputs = self._readable(self.query, grad_out, self.key, self.value)
        for kernel, function, owned, grads in (
            ("key_value", hopper_key_value_kernel, slice(2, 4), (grad_k, grad_v)),
            ("query", hopper_query_kernel, slice(0, 2), (grad_q,)),
        ):
            strides = (*folds(inputs), lse.stride(), *(grad.stride()[:3] for grad in grads))
            for programs, views, arguments, options in self._launches(kernel, inputs, owned):
                launch(function, programs, (lse, delta, *grads, *views, *strides, *arguments), options)


def fill_up(tensors: Sequence[Tensor], dim: int, unit: int) -> tuple[Tensor, ...]:
    """Up to four tensors (B, H, N, D) of one shape, channels side by side, with zeros after N and D.

    Returns:
        (B, H, N up to a multiple of ``unit``, dim), contiguous.
    """
    from longnet.backends.kernels.fill_up import fill_up_kernel

    batch, heads, length, channels = tensors[0].shape
    filled = -(-length // unit) * unit
    room = tensors[0].new_empty(len(tensors), batch, heads, filled, dim)
    tiles = -(-filled // _FILLED_ROWS)
    programs = tiles * heads * batch
    four = [*tensors, *[tensors[-1]] * (4 - len(tensors))]
    arguments = (*four, room, *(x.stride()[:3] for x in four), length, filled, heads, tiles, programs)
    options = {"CHANNELS": channels, "D": dim, "ROWS": _FILLED_ROWS}
    launch(fill_up_kernel, programs * len(tensors), arguments, options)
    return room.unbind()
