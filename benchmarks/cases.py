"""A case: one call of attention, its random inputs, and what it counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.geometry import Pattern, score_pairs

PASSES, DTYPES = ("forward", "forward_backward"), ("float32", "bfloat16")
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call: (B, H, N, D) of a dtype with a pattern."""

    length: int
    dtype: str
    heads: int = 12
    head_dim: int = 64
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192)
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    batch: int = 1
    is_causal: bool = True

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.segment_lengths, self.dilation_rates)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D)."""
        return (self.batch, self.heads, self.length, self.head_dim)

    @property
    def block(self) -> int:
        """Rows that attend to each other in one segment of one head: the side of the same-FLOP kernel's squares."""
        return min(w // r for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def blocks(self) -> int:
        """How many dense blocks the same-FLOP kernel runs."""
        return self.length // self.block

    @property
    def flop_ratio(self) -> Fraction:
        """Score FLOPs of this pattern over those of the same-FLOP kernel's dense blocks. Exact."""
        dense = Pattern.parse(self.block, 1)
        return Fraction(
            score_pairs(self.pattern, self.heads, self.length, self.is_causal),
            score_pairs(dense, self.heads, self.blocks * self.block, self.is_causal),
        )

    @property
    def dense_ratio(self) -> Fraction:
        """Score FLOPs of dense attention over the whole sequence over those of this pattern. Exact."""
        dense = score_pairs(Pattern.parse(self.length, 1), self.heads, self.length, self.is_causal)
        return Fraction(dense, score_pairs(self.pattern, self.heads, self.length, self.is_causal))

    def small(self, length: int = 600) -> Case:
        """The same structure at a size that the dense oracle affords; the length divides by nothing."""
        shrink = max(1, max(self.segment_lengths) // 512)
        segments = tuple(max(r, w // shrink) for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))
        return replace(self, length=length, segment_lengths=segments)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        known: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        return cls(**known)

    def __str__(self) -> str:
        return f"N={self.length} {self.dtype}"

    @property
    def label(self) -> str:
        causal = "causal" if self.is_causal else "not causal"
        return f"N={self.length} H={self.heads} D={self.head_dim} {causal} {self.dtype}"

    @property
    def cases(self) -> tuple[Case, ...]:
        """The calls of attention of a cell of a suite: here this one."""
        return (self,)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one (B, H, N, D) tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """Random inputs of a call and the gradient that flows into its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.inputs, self.grad_out

    def map(self, change: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(*map(change, self.all))

    def tokens_first(self) -> Tensors:
        """The same values in (B, N, H, D) memory: what a module has after its projections."""
        return self.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))

    def rows(self) -> Tensors:
        """The same values as (B, N, H * D), copied: what torchscale and others take."""
        return self.map(lambda x: x.transpose(1, 2).flatten(2).contiguous())

    def view(self, *shape: int) -> Tensors:
        """The same memory in another shape: as good as any random numbers, and no copy."""
        return self.map(lambda x: x.view(shape))

    def first(self, *shape: int) -> Tensors:
        """Contiguous tensors of this shape in the memory of longer ones."""
        return self.map(lambda x: x.view(-1)[: math.prod(shape)].view(shape))

    def double(self) -> Tensors:
        return self.map(Tensor.double)


def draw(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensors:
    """Standard normal tensors (B, H, N, D); never zeros, whose products some hardware computes faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        if generator.device.type != "cpu":
            return torch.randn(case.shape, dtype=case.torch_dtype, device=device, generator=generator)
        x = torch.empty(case.shape, dtype=case.torch_dtype)
        # Slices of 64 KiB: freeing a large one would raise the size from which malloc maps memory by itself, and so
        # what the process keeps of memory freed later.
        for part in torch.split(x.view(-1), 1 << 14):
            part.copy_(torch.randn(part.shape, generator=generator))
        return x

    return Tensors(normal(), normal(), normal(), normal())


class Call(NamedTuple):
    """A case and one of :data:`PASSES`."""

    case: Case
    which: str

    @property
    def cases(self) -> tuple[Case, ...]:
        return (self.case,)

    @property
    def label(self) -> str:
        return f"{self.case.label} {self.which}"


def variants(base: Case, **axes: Sequence[Any]) -> tuple[Case, ...]:
    """The case with every combination of these values of its fields, the last one changing fastest."""
    return tuple(replace(base, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))


# On a CPU the default pattern; on a GPU the paper's series; small ones that only show that the benchmark works.
CPU = Case(8192, "float32")
CPU_QUICK = Case(256, "float32", heads=4, head_dim=16, segment_lengths=(32, 64, 128))
GPU_SEGMENTS, GPU_RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
GPU = Case(1048576, "bfloat16", heads=16, segment_lengths=GPU_SEGMENTS, dilation_rates=GPU_RATES)
GPU_QUICK = Case(512, "bfloat16", heads=4, head_dim=64, segment_lengths=(128, 256), dilation_rates=(1, 2))
GIGAPATH = Case(10001, "float16", 16, 48, (1024, 5792, 32768, 185363, 1048576), GPU_RATES, is_causal=False)
BASES = {"cpu": CPU, "cpu-quick": CPU_QUICK, "cuda": GPU, "cuda-quick": GPU_QUICK}
