"""Heads with explicit numbers, for kernels that take a head's offset from its place: they get all heads, and some are dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longnet.attention.backends.views import repeat_heads, sum_heads
from longnet.attention.call import AttentionInputs, Gradients, SavedForward

_log = logging.getLogger("longnet")
Forward = Callable[[AttentionInputs], tuple[Tensor, Tensor]]
Backward = Callable[[SavedForward, Tensor, Tensor | None], Gradients]


class _HeadScatter:
    """Where a call's heads are among all of the pattern's; every query head gets a key/value head of its own.

    Heads that are not there are zeros. Their rows are finite and are not read, so the others are exact; they cost as much.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        numbers = inputs.spec.pattern.head_numbers
        assert numbers is not None
        _log.debug(
            "triton: heads %s are computed among all %d: kernels take offsets from a head's place",
            *vars(numbers).values(),
        )
        self.total, self.given = numbers.total, inputs
        self.index = torch.tensor(numbers.numbers, device=inputs.query.device)
        key, value = (self.spread(repeat_heads(x, inputs.group)) for x in (inputs.key, inputs.value))
        bias = None if inputs.bias is None else self.spread(inputs.bias, 0)
        spec = replace(inputs.spec, pattern=replace(inputs.spec.pattern, head_numbers=None))
        self.inputs = replace(inputs, query=self.spread(inputs.query), key=key, value=value, bias=bias, spec=spec)

    def spread(self, x: Tensor, axis: int = 1) -> Tensor:
        """(B, H, ...) to (B, total, ...)."""
        shape = (*x.shape[:axis], self.total, *x.shape[axis + 1 :])
        return x.new_zeros(shape).index_copy_(axis, self.index, x)

    def picked(self, x: Tensor, like: Tensor, group: int = 1) -> Tensor:
        """(B, total, ...) to the layout of ``like``, (B, H / group, ...)."""
        return torch.empty_like(like).copy_(sum_heads(x.index_select(1, self.index), group))


def forward_among_all_heads(forward: Forward, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``forward(inputs)``, where ``forward`` knows no head numbers."""
    at = _HeadScatter(inputs)
    out, lse = forward(at.inputs)
    return at.picked(out, inputs.query), lse.index_select(1, at.index)


def backward_among_all_heads(
    backward: Backward, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """``backward(saved, grad_out, grad_lse)``, where ``backward`` knows no head numbers."""
    at, given = _HeadScatter(saved.inputs), saved.inputs
    whole = SavedForward(at.inputs, at.spread(saved.out), at.spread(saved.lse))
    grads = backward(whole, at.spread(grad_out), None if grad_lse is None else at.spread(grad_lse))
    return Gradients(
        at.picked(grads.query, given.query),
        at.picked(grads.key, given.key, given.group),
        at.picked(grads.value, given.value, given.group),
        grads.bias if given.bias is None else grads.bias.index_select(0, at.index),
    )
