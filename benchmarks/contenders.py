"""What is timed: this project, the same-FLOP kernel on the CPU, dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Tensors, draw_shape
from benchmarks.checks import Attend, attend_dilated

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Contender:
    """Something to time: ``passes["forward"]()`` gives out, ``passes["forward_backward"]()`` out and gradients."""

    name: str
    passes: dict[str, Callable[[], tuple[Tensor, ...]]]


def contender(name: str, attend: Attend, tensors: Tensors) -> Contender:
    """A differentiable function of q, k, v on given tensors."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors.all[:3])

    def forward() -> tuple[Tensor, ...]:
        return (attend(tensors.query, tensors.key, tensors.value),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, tensors.grad_out))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def ours(case: Case, tensors: Tensors, name: str = "ours") -> Contender:
    """``longnet.dilated_attention``, through autograd."""
    return contender(name, attend_dilated(case), tensors)


def same_flop(case: Case) -> Contender:
    """torch's CPU flash kernel, called bare, on dense (blocks, H, block, D): scale its time by ``case.flop_ratio``.

    What dilation would cost if reading strided rows, looping and mixing were free.
    """
    shape = (case.batch * case.blocks, case.heads, case.block, case.head_dim)
    query, key, value, grad_out = draw_shape(shape, case.torch_dtype, seed=2).all

    def forward() -> tuple[Tensor, ...]:
        return tuple(_flash(query, key, value, 0.0, case.is_causal))

    def forward_backward() -> tuple[Tensor, ...]:
        out, lse = _flash(query, key, value, 0.0, case.is_causal)
        return (out, *_flash_backward(grad_out, query, key, value, out, lse, 0.0, case.is_causal))

    return Contender("same_flop", {"forward": forward, "forward_backward": forward_backward})


def dense(case: Case, tensors: Tensors) -> Contender:
    """``F.scaled_dot_product_attention`` over the whole sequence: quadratic, and another function."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return contender("dense", attend, tensors)
