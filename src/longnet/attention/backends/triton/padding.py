"""Padding masks of the Hopper kernels: what a call works out before its kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longnet.attention.backends.triton.steps import Step, Tensors
from longnet.runtime.triton_internals import Launch, Value

# Groups of tokens that a program counts at a time.
_GROUPS = 256


@dataclass(frozen=True)
class CountPadding:
    """``padding_counts`` of the mask ``padding``, see ``kernels.count_padding``."""

    def _empty(self, padding: Tensor, device: torch.device | str) -> Tensor:
        from longnet.attention.backends.triton.kernels.count_padding import TOKENS

        batch, length = padding.shape
        return torch.empty(batch, -(-length // TOKENS.value) + 1, dtype=torch.int32, device=device)

    def announce(self, tensors: Tensors) -> None:
        tensors["padding_counts"] = self._empty(tensors["padding"], "meta")

    def run(self, tensors: Tensors) -> None:
        padding = tensors["padding"]
        counts = tensors["padding_counts"] = self._empty(padding, padding.device)
        _counting(*padding.shape, *padding.stride(), padding.device).run((padding, counts))


def count_padding(tensors: Tensors) -> Iterator[Step]:
    """The step that counts padded tokens, where there is a mask and they are not counted yet."""
    if tensors["padding"] is not None and tensors["padding_counts"] is None:
        yield CountPadding()


def strides_of_padding(tensors: Tensors) -> tuple[int, int] | None:
    """Of the mask, as kernels take them; None where there is none."""
    padding = tensors["padding"]
    return None if padding is None else (Value(padding.stride(0)), padding.stride(1))


def padding_pointers(of_keys: bool) -> tuple[str, ...]:
    """The names that a kernel is given. One that owns keys reads the mask at the end alone, whatever it holds."""
    return ("padding",) if of_keys else ("padding", "padding_counts")


@lru_cache(maxsize=512)
def _counting(batch: int, length: int, by_row: int, by_token: int, device: torch.device) -> Launch:
    """Devices have launches of their own."""
    from longnet.attention.backends.triton.kernels.count_padding import count_padding_kernel

    rest = (Value(by_row), by_token), Value(length)
    return Launch(count_padding_kernel, batch, (), rest, {"GROUPS": _GROUPS, "num_warps": 8})
