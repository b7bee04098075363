"""Queries of a shard and received keys as ordinary calls of a backend.

A backend multiplies them many times as fast as the plain torch of :mod:`longnet.attention.chunked`, which serves what these
cannot. Ordinary calls have as many queries as keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs, AttentionSpec, SavedForward
from longnet.geometry import Pattern

# Fewer queries or keys than these are not worth a call.
LEAST_ROWS = 512
_ALL = Pattern.compose(segment_lengths=None, dilation_rates=1)


@dataclass(frozen=True)
class OrdinaryCall:
    """A call in which a queries and b keys lie.

    Args:
        place: rows (B, h, a, ...) of queries to rows of the call; what others it has are 0.
        merge: the call's out and lse to out (B, h, a, D) and lse (B, h, a).
        sum_queries: gradients like the call's query to those of the queries (B, h, a, D), in a dtype.
        sum_keys: gradients like the call's keys to those of the keys (B, h / share, b, D), in a dtype.
    """

    inputs: AttentionInputs
    backend: Backend
    place: Callable[[Tensor], Tensor]
    merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    sum_queries: Callable[[Tensor, torch.dtype], Tensor]
    sum_keys: Callable[[Tensor, torch.dtype], Tensor]

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, h, a, D) and lse (B, h, a) of these keys alone."""
        return self.merge(*self.backend.run(self.inputs))

    def backward(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the queries (B, h, a, D), and of the keys and values (B, h / share, b, 2 D), of the dtype of the lse.

        Args:
            out, lse, grad_out, grad_lse: of the queries' rows in the joint softmax.
        """
        saved = SavedForward(self.inputs, self.place(out), self.place(lse))
        grad_lse = None if grad_lse is None else self.place(grad_lse)
        grad_q, *grads, _ = self.backend.run_backward(saved, self.place(grad_out), grad_lse)
        return self.sum_queries(grad_q, lse.dtype), torch.cat([self.sum_keys(grad, lse.dtype) for grad in grads], -1)


def cut(queries: int, keys: int) -> tuple[int, int, int]:
    """(pieces of the queries, pieces of the keys, rows of a piece) of few pieces that are little more than all pairs."""
    most, least = max(queries, keys), min(queries, keys)
    best = (0, 0, 0, 0)
    for few in (1, 2, 3):
        for many in (most * few // least, -(-most * few // least)):
            size = max(-(-most // many), -(-least // few))
            pairs = many * few * size * size
            # More pieces have to save a tenth.
            if not best[0] or 1.1 * pairs < best[0]:
                best = (pairs, many, few, size)
    _, many, few, size = best
    return (many, few, size) if queries >= keys else (few, many, size)


def rectangle_call(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None, scale: float
) -> OrdinaryCall:
    """Every query reads every key: each piece of the queries meets each piece of the keys, all in one batch.

    Args:
        query: (B, h, a, D).
        key, value: (B, h / share, b, D).
        padded: (B, b) bool, or None.
    """
    batch, _, count, _ = query.shape
    length = key.shape[2]
    pieces, key_pieces, size = cut(count, length)

    def in_pieces(x: Tensor, number: int, axis: int = 2) -> Tensor:
        """(B, ..., n, ...) to (B, number, ..., size, ...), filled up with zeros."""
        if missing := number * size - x.shape[axis]:
            x = torch.cat((x, x.new_zeros(*x.shape[:axis], missing, *x.shape[axis + 1 :])), axis)
        return x.unflatten(axis, (number, size)).movedim(axis, 1)

    def place(x: Tensor) -> Tensor:
        x = in_pieces(x, pieces)[:, :, None]
        return x.expand(batch, pieces, key_pieces, *x.shape[3:]).flatten(0, 2)

    def repeated(x: Tensor, axis: int = 2) -> Tensor:
        x = in_pieces(x, key_pieces, axis)[:, None]
        return x.expand(batch, pieces, *x.shape[2:]).flatten(0, 2)

    def by_piece(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, pieces, key_pieces))

    def joined(x: Tensor, total: int) -> Tensor:
        """The inverse of :func:`in_pieces`."""
        return x.movedim(1, 2).flatten(2, 3)[:, :, :total]

    def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        outs, all_lse = by_piece(out), by_piece(lse)
        if key_pieces == 1:
            return joined(outs[:, :, 0], count), joined(all_lse[:, :, 0], count)
        total = all_lse.logsumexp(2)
        weights = (all_lse - total[:, :, None]).exp().nan_to_num(0.0)
        mixed = (outs.to(lse.dtype) * weights[..., None]).sum(2)
        return joined(mixed, count), joined(total, count)

    def sum_queries(x: Tensor, kind: torch.dtype) -> Tensor:
        return joined(by_piece(x).sum(2, dtype=kind), count)

    def sum_keys(x: Tensor, kind: torch.dtype) -> Tensor:
        return joined(by_piece(x).sum(1, dtype=kind), length)

    if padded is None and key_pieces * size > length:
        padded = torch.zeros(batch, length, dtype=torch.bool, device=query.device)
    mask = None
    if padded is not None:
        missing = padded.new_ones(batch, key_pieces * size - length)
        mask = repeated(torch.cat((padded, missing), 1), 1)
    spec = AttentionSpec(_ALL, False, scale)
    inputs = AttentionInputs(place(query), repeated(key), repeated(value), mask, None, spec)
    return OrdinaryCall(inputs, backend, place, merge, sum_queries, sum_keys)


def triangle_call(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None, scale: float, from_own: bool
) -> OrdinaryCall:
    """As many queries as keys: query i reads the keys from i on, or up to i. Other arguments as of :func:`rectangle_call`.

    Args:
        from_own: whether it reads those from i on: then both are turned round.
    """

    def turned(x: Tensor, axis: int = 2) -> Tensor:
        return x.flip(axis) if from_own else x

    def sums(x: Tensor, kind: torch.dtype) -> Tensor:
        return turned(x).to(kind)

    mask = None if padded is None else turned(padded, 1)
    inputs = AttentionInputs(turned(query), turned(key), turned(value), mask, None, AttentionSpec(_ALL, True, scale))
    return OrdinaryCall(inputs, backend, turned, lambda out, lse: (turned(out), turned(lse)), sums, sums)
