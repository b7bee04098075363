"""What is timed: this project, and torch's dense attention as the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, Tensors
from benchmarks.checks import Attend, attend_dense, attend_dilated
from benchmarks.device import Device


@dataclass(frozen=True)
class Contender:
    """Something to time: ``passes["forward"]()`` gives out, ``passes["forward_backward"]()`` out and gradients."""

    name: str
    passes: dict[str, Callable[[], tuple[Tensor, ...]]]


def contender(name: str, attend: Attend, tensors: Tensors) -> Contender:
    """A differentiable function of q, k, v on given tensors."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors.inputs)

    def forward() -> tuple[Tensor, ...]:
        return (attend(*tensors.inputs),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, tensors.grad_out))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def ours(case: Case, tensors: Tensors, name: str = "ours") -> Contender:
    """``longnet.dilated_attention``, through autograd."""
    return contender(name, attend_dilated(case), tensors)


def bare_dense(device: Device, tensors: Tensors, is_causal: bool, name: str = "dense") -> Contender:
    """The device's fastest dense attention on (B, H, N, D), forward and backward called without autograd."""

    def forward() -> tuple[Tensor, ...]:
        return device.attend(tensors, is_causal)[:1]

    def forward_backward() -> tuple[Tensor, ...]:
        saved = device.attend(tensors, is_causal)
        return (saved[0], *device.attend_backward(tensors, saved, is_causal))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def dense(device: Device, case: Case, tensors: Tensors) -> Contender:
    """Dense attention over the whole sequence, quadratic, another function: cuDNN's on a GPU, through autograd on a CPU."""
    if device.kind == "cuda":
        return bare_dense(device, tensors, case.is_causal)
    return contender("dense", attend_dense(case.is_causal), tensors)


def reference_kind(device: Device, case: Case) -> str:
    """What a case is compared with: on a GPU dense attention over the whole sequence where that is short."""
    short = device.kind == "cuda" and case.length < max(case.segment_lengths)
    return "dense" if short else "same_flop"


def reference_ratio(device: Device, case: Case) -> float:
    """What the reference's time is multiplied by."""
    return float(case.flop_ratio) if reference_kind(device, case) == "same_flop" else 1.0


def reference(device: Device, case: Case, tensors: Tensors) -> Contender:
    """torch's fastest dense attention on the same random numbers.

    As (blocks, H, block, D), one block as long as the rows of a segment: what dilation would cost if reading strided rows
    and mixing were free, its time to be scaled by ``case.flop_ratio``. Short sequences on a GPU: as (B, H, N, D).
    """
    kind = reference_kind(device, case)
    if kind == "same_flop":
        tensors = tensors.first(case.batch * case.blocks, case.heads, case.block, case.head_dim)
    return bare_dense(device, tensors, case.is_causal, kind)
