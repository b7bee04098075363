"""Random calls beyond the paper (windows, strides, blocks, offset grids), their tensors, and how results are compared."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet.geometry import HEAD_OFFSETS


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """What the operation is asked for, besides tensors."""
    branches = draw(st.lists(st.tuples(st.none() | st.integers(1, 60), st.integers(1, 9)), max_size=3))
    lengths = tuple(w for w, _ in branches)
    return {
        "segment_lengths": lengths,
        "dilation_rates": tuple(r if w is None else min(w, r) for w, r in branches),
        "window": draw(st.integers(1, 50) if not branches else st.none() | st.integers(1, 50)),
        "dilated_queries": draw(st.booleans()),
        "dilation_block": draw(st.sampled_from([1, 1, 2, 3, 8])),
        "head_offsets": draw(st.sampled_from(HEAD_OFFSETS)),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.7, -0.3])),
    }


def draw_tensors(
    batch: int, heads: int, kv_heads: int, length: int, seed: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key, value that require gradients, and a gradient of out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, length, 4) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad]


def compare(
    got: tuple[Tensor, Tensor],
    want: tuple[Tensor, Tensor],
    inputs: list[Tensor],
    grad: Tensor,
    exact: list[Tensor] | None = None,
    tolerance: float = 1e-10,
) -> None:
    """out, lse and the gradients of both; ``want`` comes from ``exact`` where that is not ``inputs``."""
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf)
    grads = []
    for (out, lse), leaves in ((got, inputs), (want, exact or inputs)):
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (out * grad).sum() + (finite * grad[..., 0]).sum()
        grads.append(torch.autograd.grad(loss, leaves, retain_graph=True))
    for one, other in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)
