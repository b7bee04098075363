"""Tensors as matrices for the tensor memory accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor


@dataclass(frozen=True)
class View:
    """A tensor (B, H, N, D) as a matrix whose rows hold some tokens each.

    Token n of head h and batch b lies in row ``t // step``, column ``t % step * token + h * column``, where
    ``t = b * batch + h * head + n`` and ``step`` is the tokens of a row.
    """

    batch: int
    head: int
    column: int
    token: int
    tokens: int

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return (self.batch, self.head, self.column, self.token)


def view_of(x: Tensor) -> View | None:
    """The tensor as a matrix, or None if its strides allow none."""
    return _view(tuple(x.shape), x.stride())


@lru_cache(maxsize=1024)
def _view(shape: tuple[int, ...], stride: tuple[int, ...]) -> View | None:
    batch, heads, length, dim = shape
    by_batch, by_head, by_token, by_channel = stride
    # A stride that is never taken may be anything.
    by_batch = by_batch if batch > 1 else by_token * length * heads
    by_head = by_head if heads > 1 else by_token * length
    if by_channel != 1 or by_token < dim or by_batch % by_token:
        return None
    if by_head < by_token:
        if by_head * heads > by_token:
            return None
        return View(by_batch // by_token, 0, by_head, by_token, (batch - 1) * (by_batch // by_token) + length)
    if by_head % by_token:
        return None
    tokens = (batch - 1) * (by_batch // by_token) + (heads - 1) * (by_head // by_token) + length
    return View(by_batch // by_token, by_head // by_token, 0, by_token, tokens)


def is_matrix(x: Tensor, dim: int, unit: int) -> bool:
    """Whether x (B, H, N, D) has ``dim`` channels and views of every rate that divides ``unit``, as it lies in memory."""
    return x.data_ptr() % 16 == 0 and _is_matrix(tuple(x.shape), x.stride(), dim, unit, x.element_size())


@lru_cache(maxsize=1024)
def _is_matrix(shape: tuple[int, ...], stride: tuple[int, ...], dim: int, unit: int, element_size: int) -> bool:
    view = _view(shape, stride)
    return (
        view is not None
        and shape[-1] == dim
        and view.token * element_size % 16 == 0
        and not any(count % unit for count in (view.tokens, view.batch, view.head))
    )
