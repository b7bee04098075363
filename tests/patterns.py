"""Random dilated-attention problems: patterns, lengths, masks, heads, offsets, layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from oracle import dense_attention
from torch import Tensor

from longnet.geometry import Pattern


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; everything follows from small integers, so hypothesis can shrink and print it."""

    batch: int
    kv_heads: int
    group: int
    length: int
    head_dim: int
    branches: tuple[tuple[int, int], ...]
    is_causal: bool
    head_offsets: str
    padding: float | None
    tokens_first: bool
    seed: int
    dtype: torch.dtype = field(default=torch.float64)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(w for w, _ in self.branches)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        return tuple(r for _, r in self.branches)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v that require gradients, in (B, H, N, D) or (B, N, H, D) memory."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, self.length, heads, self.head_dim)
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).transpose(1, 2)
            x = x.clone(memory_format=torch.preserve_format) if self.tokens_first else x.contiguous()
            return x.requires_grad_()

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)

    def mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.length, generator=generator) < self.padding

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Gradients that flow into out and lse."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.batch, self.heads, self.length, self.head_dim)
        out = torch.randn(shape, generator=generator, dtype=torch.float64)
        return out, torch.randn(shape[:-1], generator=generator, dtype=torch.float64)

    def options(self) -> dict[str, object]:
        return {"is_causal": self.is_causal, "key_padding_mask": self.mask(), "head_offsets": self.head_offsets}

    def oracle(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(out, lse, gradients) by the definition, in float64."""
        inputs = tuple(x.detach().double().requires_grad_() for x in self.tensors())
        out, lse = dense_attention(*inputs, self.segment_lengths, self.dilation_rates, **self.options())
        return out, lse, backward(out, lse, inputs, self.upstream())


def backward(
    out: Tensor, lse: Tensor, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of <out, g> + <lse, h>, leaving out rows without keys (their lse is -inf)."""
    grad_out, grad_lse = upstream
    total = (out * grad_out.to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.to(lse.dtype)).sum()
    return torch.autograd.grad(total, inputs)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; the absolute error where the expectation is zero (up to rounding)."""
    expected = expected.double()
    norm = expected.norm().item()
    error = (got.double() - expected).norm().item()
    return error if norm < 1e-9 else error / norm


@st.composite
def branches(draw: st.DrawFn, longest: int = 40) -> tuple[tuple[int, int], ...]:
    count = draw(st.integers(1, 3))
    found = []
    for _ in range(count):
        w = draw(st.integers(1, longest))
        found.append((w, draw(st.integers(1, min(w, 7)))))
    return tuple(found)


def problems() -> st.SearchStrategy[Problem]:
    return st.builds(
        Problem,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        length=st.integers(1, 45),
        head_dim=st.sampled_from([1, 2, 5, 8]),
        branches=branches(),
        is_causal=st.booleans(),
        head_offsets=st.sampled_from(["interleaved", "blocked"]),
        padding=st.sampled_from([None, None, 0.2, 0.8]),
        tokens_first=st.booleans(),
        seed=st.integers(0, 2**16),
    )


@dataclass(frozen=True)
class KeptHeads:
    """A problem on all heads, and the key/value heads that are kept of it."""

    problem: Problem
    kv_heads: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        group = self.problem.group
        return tuple(head for kv in self.kv_heads for head in range(kv * group, (kv + 1) * group))

    @property
    def pattern(self) -> Pattern:
        one = self.problem
        return Pattern.parse(one.segment_lengths, one.dilation_rates, one.head_offsets, self.numbers, one.heads)

    def tensors(self) -> tuple[Tensor, ...]:
        q, k, v = (x.detach() for x in self.problem.tensors())
        kept = q[:, self.numbers], k[:, self.kv_heads], v[:, self.kv_heads]
        return tuple(x.requires_grad_() for x in kept)

    def upstream(self) -> tuple[Tensor, ...]:
        return tuple(x[:, self.numbers] for x in self.problem.upstream())

    def expected(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(out, lse, gradients) of the heads that are kept, computed among all."""
        one = self.problem
        inputs = tuple(x.detach().double().requires_grad_() for x in one.tensors())
        out, lse = dense_attention(*inputs, one.segment_lengths, one.dilation_rates, **one.options())
        out, lse = out[:, self.numbers], lse[:, self.numbers]
        q, k, v = backward(out, lse, inputs, self.upstream())
        return out, lse, (q[:, self.numbers], k[:, self.kv_heads], v[:, self.kv_heads])


@st.composite
def kept_heads(draw: st.DrawFn) -> KeptHeads:
    problem = draw(problems())
    problem = Problem(**{**vars(problem), "kv_heads": draw(st.integers(1, 9))})
    chosen = draw(st.sets(st.integers(0, problem.kv_heads - 1), min_size=1))
    return KeptHeads(problem, tuple(sorted(chosen)))
