"""Queries of a shard and received keys as ordinary calls of a backend.

A backend multiplies a shard's queries and the keys of others many times as fast as the plain torch of
:mod:`longnet.attention.chunked`, which serves what these cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs, AttentionSpec, SavedForward
from longnet.geometry import Pattern

# Fewer queries or keys are rows: a call of their own would not be faster.
LEAST_ROWS = 512
_ALL = Pattern.compose(segment_lengths=None, dilation_rates=1)


@dataclass(frozen=True)
class OrdinaryCall:
    """A call in which the rows of a queries and b keys lie.

    Args:
        place: rows (B, h, a, ...) of queries to rows of the call; what others it has are 0.
        rows: the inverse, of the call's rows.
        sum_keys: gradients like the call's keys to those of the keys, (B, h / share, b, D), in a dtype.
    """

    inputs: AttentionInputs
    backend: Backend
    place: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    sum_keys: Callable[[Tensor, torch.dtype], Tensor]

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, h, a, D) and lse (B, h, a) of these keys alone."""
        out, lse = self.backend.run(self.inputs)
        return self.rows(out), self.rows(lse)

    def backward(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the queries (B, h, a, D), and of the keys and values (B, h / share, b, 2 D), of the dtype of the lse.

        Args:
            out, lse, grad_out, grad_lse: of the queries' rows in the joint softmax.
        """
        saved = SavedForward(self.inputs, self.place(out), self.place(lse))
        grad_lse = None if grad_lse is None else self.place(grad_lse)
        grad_q, *grads, _ = self.backend.run_backward(saved, self.place(grad_out), grad_lse)
        kind = lse.dtype
        return self.rows(grad_q).to(kind), torch.cat([self.sum_keys(grad, kind) for grad in grads], -1)


def square_call(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None, scale: float
) -> OrdinaryCall:
    """Every query reads every key: as many queries at a time as there are keys, one such piece after the other in the batch.

    Args:
        query: (B, h, a, D).
        key, value: (B, h / share, b, D).
        padded: (B, b) bool, or None.
    """
    batch, _, count, _ = query.shape
    size = key.shape[2]
    pieces = -(-count // size)

    def place(x: Tensor) -> Tensor:
        if pieces * size > count:
            filled = x.new_zeros(*x.shape[:2], pieces * size, *x.shape[3:])
            filled[:, :, :count] = x
            x = filled
        return x.unflatten(2, (pieces, size)).transpose(1, 2).flatten(0, 1)

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, pieces)).transpose(1, 2).flatten(2, 3)[:, :, :count]

    def repeat(x: Tensor) -> Tensor:
        return x[:, None].expand(batch, pieces, *x.shape[1:]).flatten(0, 1)

    def sum_keys(x: Tensor, kind: torch.dtype) -> Tensor:
        return x.unflatten(0, (batch, pieces)).sum(1, dtype=kind)

    mask = None if padded is None else repeat(padded)
    spec = AttentionSpec(_ALL, False, scale)
    inputs = AttentionInputs(place(query), repeat(key), repeat(value), mask, None, spec)
    return OrdinaryCall(inputs, backend, place, rows, sum_keys)


def border_call(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padded: Tensor | None,
    scale: float,
    window: int,
    is_causal: bool,
    keys_first: bool,
) -> OrdinaryCall:
    """Queries and keys on both sides of a border, which see each other in a window: one sequence of both.

    The sequence has no keys where its queries are: what these say to each other is of another call. Arguments as of
    :func:`square_call`.

    Args:
        keys_first: whether the keys are before the border.
    """
    count, size = query.shape[2], key.shape[2]

    def joined(of_keys: Tensor, of_queries: Tensor, axis: int = 2) -> Tensor:
        return torch.cat((of_keys, of_queries) if keys_first else (of_queries, of_keys), axis)

    def none_of(x: Tensor, length: int) -> Tensor:
        return x.new_zeros(*x.shape[:2], length, *x.shape[3:])

    def place(x: Tensor) -> Tensor:
        return joined(none_of(x, size), x)

    def rows(x: Tensor) -> Tensor:
        return x.narrow(2, size if keys_first else 0, count)

    def sum_keys(x: Tensor, kind: torch.dtype) -> Tensor:
        return x.narrow(2, 0 if keys_first else count, size).to(kind)

    if padded is None:
        padded = torch.zeros(len(query), size, dtype=torch.bool, device=query.device)
    inputs = AttentionInputs(
        place(query),
        joined(key, none_of(key, count)),
        joined(value, none_of(value, count)),
        joined(padded, padded.new_ones(len(query), count), 1),
        None,
        AttentionSpec(Pattern.compose((), (), window=window), is_causal, scale),
    )
    return OrdinaryCall(inputs, backend, place, rows, sum_keys)
