"""Calls beyond the paper over shards: their tensors, what the definition gives, and how both are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from on_shards import run_shard, together
from oracle import dense_attention
from torch import Tensor

from longnet.attention.functional import pattern_attention
from longnet.geometry import HeadNumbers, Pattern

MIXED = {
    "segment_lengths": (None, 24),
    "dilation_rates": (3, 2),
    "window": 9,
    "dilated_queries": False,
    "dilation_block": 2,
    "head_offsets": "interleaved",
    "is_causal": True,
    "scale": None,
}
PAPER = {"segment_lengths": (64, 24), "dilation_rates": (1, 3), "window": None, "dilated_queries": True}


@dataclass(frozen=True)
class Case:
    """A call over shards; tensors follow from the seed.

    Args:
        offset: of the grid, or one for each row of the batch.
        padded: some keys are, and hold NaN. Padded queries have no gradient.
        pruned: how many heads there were before these.
    """

    shards: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=lambda: MIXED)
    offset: int | tuple[int, ...] = 0
    kv_heads: int = 2
    group: int = 2
    padded: bool = False
    biased: bool = False
    pruned: int = 0
    dtype: torch.dtype = torch.float64
    backend: str = "auto"
    seed: int = 0

    @property
    def batch(self) -> int:
        return 1 if isinstance(self.offset, int) else len(self.offset)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def pattern(self) -> Pattern:
        names = ("window", "dilated_queries", "dilation_block", "head_offsets")
        options = {name: self.call[name] for name in names}
        pattern = Pattern.compose(self.call["segment_lengths"], self.call["dilation_rates"], **options)
        total = self.heads + self.pruned
        return (
            replace(pattern, head_numbers=HeadNumbers(tuple(range(self.pruned, total)), total))
            if self.pruned
            else pattern
        )

    @property
    def segment_offset(self) -> int | Tensor:
        return self.offset if isinstance(self.offset, int) else torch.tensor(self.offset, dtype=torch.int64)

    def inputs(self) -> dict[str, Tensor | None]:
        """Of the whole sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        length = sum(self.shards)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype)

        shapes = [(self.batch, heads, length, 4) for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        found: dict[str, Tensor | None] = dict(
            zip(("query", "key", "value", "grad"), (normal(*shape) for shape in shapes), strict=True)
        )
        found |= {"grad_lse": normal(self.batch, self.heads, length), "mask": None, "bias": None}
        if self.padded:
            found["mask"] = torch.rand(self.batch, length, generator=generator) < 0.3
        if self.biased:
            found["bias"] = normal(self.heads, 2 * self.pattern.span(length) - 1)
        return found

    def run(self, inputs: dict[str, Tensor | None], group: object = None, exact: bool = False) -> dict[str, Tensor]:
        """out, lse and all gradients of a call on these inputs, by the definition if ``exact``."""
        leaves = {name: inputs[name] for name in ("query", "key", "value", "bias") if inputs[name] is not None}
        leaves = {name: x.detach().clone() for name, x in leaves.items()}
        grad, grad_lse, mask = inputs["grad"].clone(), inputs["grad_lse"].clone(), inputs["mask"]
        if mask is not None:
            grad[mask[:, None].expand(grad.shape[:3])] = 0
            grad_lse[mask[:, None].expand(grad_lse.shape)] = 0
            for x in (leaves[name] for name in ("query", "key", "value") if not exact):
                x[mask[:, None].expand(x.shape[:3])] = torch.nan
        for x in leaves.values():
            x.requires_grad_()
        bias, options = leaves.get("bias"), {"segment_offset": self.segment_offset, "key_padding_mask": mask}
        if exact:
            score_bias = None
            if bias is not None:
                place, reach = torch.arange(sum(self.shards)), bias.shape[1] // 2
                score_bias = bias[:, (place - place[:, None]).clamp(-reach, reach) + reach]
            tensors = (leaves["query"], leaves["key"], leaves["value"])
            out, lse = dense_attention(*tensors, **self.call, **options, score_bias=score_bias)
        else:
            out, lse = pattern_attention(
                leaves["query"], leaves["key"], leaves["value"], self.pattern, is_causal=self.call["is_causal"],
                scale=self.call["scale"], distance_bias=bias, return_lse=True, backend=self.backend, group=group, **options,
            )  # fmt: skip
        outputs = [out, lse.masked_fill(lse.isinf(), 0.0)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), [grad, grad_lse.to(lse.dtype)])
        found = {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}
        if mask is not None:
            # What a padded query that holds NaN gives is its own affair.
            for name in ("out", "lse"):
                found[name][mask[:, None].expand(found[name].shape[:3])] = 0
        return found


def compare(ranks, case, tolerance=1e-10, run=run_shard):
    got = together(ranks(len(case.shards), run, case))
    want = case.run(case.inputs(), exact=True)
    assert torch.equal(got["lse"] == -torch.inf, want["lse"] == -torch.inf)
    for name in want:
        finite = want["lse"].isfinite() if name == "lse" else ...
        torch.testing.assert_close(got[name][finite], want[name][finite], rtol=tolerance, atol=tolerance, msg=name)
