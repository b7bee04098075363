"""Heads with explicit numbers, for kernels that take a head's offset from its place: they get all heads, and some are dropped."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from longnet.backends.operators import BackwardFn, ForwardFn, Spec, repeat_heads, sum_heads

_log = logging.getLogger("longnet")


class _Places:
    """Where a call's heads are among all of the pattern's; every query head gets a key/value head of its own.

    Heads that are not there are zeros. Their rows are finite and nobody reads them, so the others are exact; they cost as much.
    """

    def __init__(self, query: Tensor, key: Tensor, spec: Spec) -> None:
        numbers = spec.pattern.head_numbers
        assert numbers is not None
        _log.debug(
            "triton: heads %s are computed among all %d: kernels take offsets from a head's place",
            *vars(numbers).values(),
        )
        self.total, self.group = numbers.total, query.shape[1] // key.shape[1]
        self.index = torch.tensor(numbers.numbers, device=query.device)
        self.spec = replace(spec, pattern=replace(spec.pattern, head_numbers=None))

    def spread(self, x: Tensor, axis: int = 1) -> Tensor:
        """(B, H, ...) to (B, total, ...)."""
        shape = (*x.shape[:axis], self.total, *x.shape[axis + 1 :])
        return x.new_zeros(shape).index_copy_(axis, self.index, x)

    def spread_kv(self, x: Tensor) -> Tensor:
        """(B, Hk, ...) to (B, total, ...)."""
        return self.spread(repeat_heads(x, self.group))

    def picked(self, x: Tensor, like: Tensor, group: int = 1) -> Tensor:
        """(B, total, ...) to the layout of ``like``, (B, H / group, ...)."""
        return torch.empty_like(like).copy_(sum_heads(x.index_select(1, self.index), group))


def among_all_heads(forward: ForwardFn, backward: BackwardFn) -> tuple[ForwardFn, BackwardFn]:
    """A backend's two functions, which know no head numbers, as two that take them."""

    def numbered_forward(
        query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        if spec.pattern.head_numbers is None:
            return forward(query, key, value, padding, bias, spec)
        at = _Places(query, key, spec)
        table = None if bias is None else at.spread(bias, 0)
        out, lse = forward(at.spread(query), at.spread_kv(key), at.spread_kv(value), padding, table, at.spec)
        return at.picked(out, query), lse.index_select(1, at.index)

    def numbered_backward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        spec: Spec,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if spec.pattern.head_numbers is None:
            return backward(grad_out, grad_lse, query, key, value, padding, bias, out, lse, spec)
        at = _Places(query, key, spec)
        grad_q, grad_k, grad_v, grad_bias = backward(
            at.spread(grad_out), None if grad_lse is None else at.spread(grad_lse), at.spread(query), at.spread_kv(key),
            at.spread_kv(value), padding, None if bias is None else at.spread(bias, 0), at.spread(out), at.spread(lse),
            at.spec,
        )  # fmt: skip
        if bias is not None:
            grad_bias = grad_bias.index_select(0, at.index)
        return (
            at.picked(grad_q, query), at.picked(grad_k, key, at.group), at.picked(grad_v, value, at.group), grad_bias,
        )  # fmt: skip

    return numbered_forward, numbered_backward
