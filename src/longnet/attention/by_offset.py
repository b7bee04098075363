"""Rows of a batch whose grids are offset differently: those that agree are computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

from torch import Tensor

from longnet.attention.call import AttentionInputs, Gradients, SavedForward

Forward = Callable[[AttentionInputs], tuple[Tensor, Tensor]]
Backward = Callable[[SavedForward, Tensor, Tensor | None], Gradients]


def _groups(inputs: AttentionInputs) -> Iterator[tuple[Tensor, AttentionInputs]]:
    """(numbers of rows, their inputs with one offset)."""
    assert inputs.offsets is not None
    for value in inputs.offsets.unique().tolist():
        rows = (inputs.offsets == value).nonzero()[:, 0]
        yield rows, inputs.rows(rows, value)


def by_offset(forward: Forward) -> Forward:
    """``forward``, which knows one offset for all rows, for offsets on the CPU too."""

    @wraps(forward)
    def of_all_rows(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if inputs.offsets is None:
            return forward(inputs)
        out, lse = inputs.empty_outputs()
        for rows, same in _groups(inputs):
            out[rows], lse[rows] = forward(same)
        return out, lse

    return of_all_rows


def backward_by_offset(backward: Backward) -> Backward:
    """As :func:`by_offset`."""

    @wraps(backward)
    def of_all_rows(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        inputs = saved.inputs
        if inputs.offsets is None:
            return backward(saved, grad_out, grad_lse)
        grads = inputs.empty_gradients()
        # Rows share the bias.
        grads.bias.zero_()
        for rows, same in _groups(inputs):
            part = SavedForward(same, saved.out[rows], saved.lse[rows])
            found = backward(part, grad_out[rows], None if grad_lse is None else grad_lse[rows])
            for grad, own in zip(grads[:3], found[:3], strict=True):
                grad[rows] = own
            grads.bias.add_(found.bias)
        return grads

    return of_all_rows
