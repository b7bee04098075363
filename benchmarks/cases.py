"""The registry of cases: what is measured, at which sizes, against which limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from longnet.geometry import Pattern, score_pairs

# Ratios of time, multiples of the output's size, and seconds; each is an upper limit.
LIMITS: dict[str, Any] = {
    "speed": {"forward": 1.15, "forward_backward": 1.25},
    "memory": {
        "forward": {"float32": 2.5, "bfloat16": 4.0},
        "forward_backward": {"float32": 7.0, "bfloat16": 7.0},
    },
    "growth": 0.20,
    "stream": 0.02,
    "import_seconds": 0.2,
}
PASSES = ("forward", "forward_backward")


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
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.grad_out

    def tokens_first(self) -> Tensors:
        """The same values in (B, N, H, D) memory: what a module has after its projections."""
        return Tensors(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in self.all))

    def rows(self) -> Tensors:
        """The same values as (B, N, H * D), copied: what torchscale and others take."""
        return Tensors(*(x.transpose(1, 2).flatten(2).contiguous() for x in self.all))

    def view(self, *shape: int) -> Tensors:
        """The same memory in another shape: as good as any random numbers, and no copy."""
        return Tensors(*(x.view(shape) for x in self.all))

    def first(self, *shape: int) -> Tensors:
        """Contiguous tensors of this shape in the memory of longer ones."""
        return Tensors(*(x.view(-1)[: math.prod(shape)].view(shape) for x in self.all))

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(*(x.to(dtype) for x in self.all))


def draw(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensors:
    """Standard normal tensors (B, H, N, D); never zeros, whose products some hardware computes faster."""
    return draw_shape(case.shape, case.torch_dtype, seed, device)


def draw_shape(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        if generator.device.type != "cpu":
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)
        x = torch.empty(shape, dtype=dtype)
        # Slices of 64 KiB: freeing a large one would raise the size from which malloc maps memory by itself, and so
        # what the process keeps of memory freed later.
        for part in torch.split(x.view(-1), 1 << 14):
            part.copy_(torch.randn(part.shape, generator=generator))
        return x

    return Tensors(normal(), normal(), normal(), normal())


@dataclass(frozen=True)
class Reading:
    """A stream: so many tokens, a chunk at a time, read by a small model of this pattern."""

    tokens: int
    chunk: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What one run of the benchmark covers.

    Repetitions are as many as fit into ``budget_seconds``, between the two numbers. ``slow_seconds``: dense attention is
    left out of the speed table when a call is expected to take longer than the first, and the curves of dense attention
    and peers end where it would take longer than the second.
    """

    base: Case
    dtypes: tuple[str, ...]
    speed_lengths: tuple[int, ...]
    memory_lengths: tuple[int, ...]
    growth_lengths: tuple[int, ...]
    repetitions: tuple[int, int]
    budget_seconds: float
    growth_repetitions: int
    import_repetitions: int
    noise_repetitions: int
    slow_seconds: tuple[float, float]
    reading: Reading
    judged: bool

    def memory_processes(self, length: int) -> int:
        """Long sequences take long and vary little: what malloc keeps is bounded."""
        return 3 if self.judged and length <= 32768 else 1

    def case(self, length: int, dtype: str) -> Case:
        return replace(self.base, length=length, dtype=dtype)


FULL = Sizes(
    base=Case(length=8192, dtype="float32"),
    dtypes=("float32", "bfloat16"),
    speed_lengths=(8192, 32768),
    memory_lengths=(8192, 32768, 131072),
    growth_lengths=tuple(8192 * 2**i for i in range(6)),
    repetitions=(7, 15),
    budget_seconds=20.0,
    growth_repetitions=5,
    import_repetitions=7,
    noise_repetitions=10,
    slow_seconds=(3.0, 12.0),
    reading=Reading(10_000_000, 8000, (256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256)),
    judged=True,
)

# Too small to say anything about speed: it shows that the benchmark itself works.
QUICK = Sizes(
    base=Case(length=256, dtype="float32", heads=4, head_dim=16, segment_lengths=(32, 64, 128)),
    dtypes=("float32", "bfloat16"),
    speed_lengths=(256,),
    memory_lengths=(256,),
    growth_lengths=(256, 512),
    repetitions=(3, 3),
    budget_seconds=1.0,
    growth_repetitions=3,
    import_repetitions=1,
    noise_repetitions=3,
    slow_seconds=(math.inf, math.inf),
    reading=Reading(4000, 100, (32, 64), (1, 2)),
    judged=False,
)
