"""Shards of a sequence give, together, what one device gives: forward, gradients, masks, biases, and errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_shards import bytes_sent, run_in_rectangles, run_shard, together
from patterns import branches, relative_error
from torch import Tensor

from longnet.attention.functional import dilated_attention, pattern_attention
from longnet.attention.sharding.group import _talks_on_the_host
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


@dataclass(frozen=True)
class Case:
    """A call over shards; tensors follow from the seed. Padded queries are ``dead``, without a gradient, unless that is None."""

    branches: tuple[tuple[int, int], ...]
    shards: tuple[int, ...]
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 4
    is_causal: bool = True
    head_offsets: str = "interleaved"
    padded: bool = False
    biased: bool = False
    with_lse: bool = False
    dtype: torch.dtype = torch.float64
    backend: str = "auto"
    seed: int = 0
    pruned: tuple[int, ...] = ()
    dead: float | None = None

    @property
    def pattern(self) -> Pattern:
        """Of all heads, or of those that are left of more."""
        total = self.kv_heads * self.group + len(self.pruned)
        numbers = [head for head in range(total) if head not in self.pruned] if self.pruned else None
        return Pattern.parse(*zip(*self.branches, strict=True), self.head_offsets, numbers, total)

    def inputs(self) -> dict[str, Tensor | None]:
        """Of the whole sequence. Whatever a padded key holds must not matter."""
        generator = torch.Generator().manual_seed(self.seed)
        heads, length = self.kv_heads * self.group, sum(self.shards)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype)

        found: dict[str, Tensor | None] = {
            "query": normal(self.batch, heads, length, self.head_dim),
            "key": normal(self.batch, self.kv_heads, length, self.head_dim),
            "value": normal(self.batch, self.kv_heads, length, self.head_dim),
            "grad": normal(self.batch, heads, length, self.head_dim),
            "grad_lse": normal(self.batch, heads, length),
            "mask": None,
            "bias": None,
        }
        if self.padded:
            found["mask"] = mask = torch.rand(self.batch, length, generator=generator) < 0.3
            for name in ("key", "value"):
                found[name].masked_fill_(mask[:, None, :, None], 1e4)  # type: ignore[union-attr]
            if self.dead is not None:
                for name, fill in (("query", self.dead), ("grad", 0.0)):
                    found[name].masked_fill_(mask[:, None, :, None], fill)  # type: ignore[union-attr]
                found["grad_lse"].masked_fill_(mask[:, None], 0.0)  # type: ignore[union-attr]
        if self.biased:
            reach = max(1, min(length, max(self.pattern.segment_lengths)))
            found["bias"] = normal(heads, 2 * reach - 1)
        return found

    def run(self, inputs: dict[str, Tensor | None], group: object = None) -> dict[str, Tensor]:
        """out, lse and all gradients of a call on these inputs."""
        tensors = {name: inputs[name] for name in ("query", "key", "value", "bias") if inputs[name] is not None}
        tensors = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}  # type: ignore[union-attr]
        out, lse = pattern_attention(
            tensors["query"], tensors["key"], tensors["value"], self.pattern, is_causal=self.is_causal,
            key_padding_mask=inputs["mask"], distance_bias=tensors.get("bias"), return_lse=True, backend=self.backend,
            group=group,
        )  # fmt: skip
        outputs, grads = [out], [inputs["grad"]]
        if self.with_lse:
            outputs.append(lse.masked_fill(lse.isinf(), 0.0))
            grads.append(inputs["grad_lse"].to(lse.dtype))  # type: ignore[union-attr]
        found = torch.autograd.grad(outputs, list(tensors.values()), grads)
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(tensors, found, strict=True))}


def compare(ranks, case, tolerance=1e-10, run=run_shard):
    got = together(ranks(len(case.shards), run, case))
    want = case.run(case.inputs())
    assert torch.equal(got["lse"].isfinite(), want["lse"].isfinite())
    for name in want:
        finite = want["lse"].isfinite() if name == "lse" else ...
        assert relative_error(got[name][finite], want[name][finite]) < tolerance, name


@st.composite
def cases(draw):
    sizes = draw(st.sampled_from((1, 2, 3, 4, 8)))
    shards = draw(st.lists(st.integers(0, 40), min_size=sizes, max_size=sizes).filter(sum))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2), (5, 1))))
    return Case(
        tuple(draw(branches())),
        tuple(shards),
        batch=draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        group=group,
        is_causal=draw(st.booleans()),
        head_offsets=draw(st.sampled_from(("interleaved", "blocked"))),
        padded=draw(st.booleans()),
        biased=draw(st.booleans()),
        with_lse=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        pruned=draw(st.sampled_from(((), (), (0,), (1, 2)))),
    )


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_shards_give_what_one_device_gives(ranks, case):
    compare(ranks, case)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_shards_whose_received_keys_are_read_by_a_backend(ranks, case):
    compare(ranks, case, run=run_in_rectangles)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dead", [float("nan"), float("inf")])
def test_queries_of_dead_rows_never_matter(ranks, dead, is_causal):
    case = Case(
        ((16, 1), (48, 3), (200, 4)), (30, 41, 5, 64), kv_heads=2, group=2, is_causal=is_causal, padded=True, biased=True,
        with_lse=True, dead=dead,
    )  # fmt: skip
    got = together(ranks(4, run_shard, case))
    want = together(ranks(4, run_shard, replace(case, dead=1.0)))
    for name in ("query", "key", "value", "bias"):
        assert torch.equal(got[name], want[name]) and want[name].any(), name
    assert not got["query"].transpose(1, 2)[case.inputs()["mask"]].any()


SPANS = {
    "shorter": ((16, 1), (32, 4)),
    "equal": ((64, 1), (64, 4)),
    "longer": ((48, 1), (200, 4)),
    "whole": ((2048, 2), (512, 8)),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_segments_shorter_and_longer_than_shards(ranks, size, span, is_causal):
    compare(ranks, Case(SPANS[span], (64,) * size, head_dim=8, is_causal=is_causal, kv_heads=4))


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_types(ranks, dtype, backend):
    case = Case(((64, 1), (256, 4)), (100, 128, 28, 64), kv_heads=2, group=2, head_dim=16, dtype=dtype, backend=backend)
    got = together(ranks(4, run_shard, case))
    exact = Case(**{**vars(case), "dtype": torch.float64})
    inputs = {name: x if x is None else x.double() for name, x in case.inputs().items()}
    want, single = exact.run(inputs), case.run(case.inputs())
    for name in want:
        # Whatever one device loses to this type, and half as much again: sums are rounded once more.
        allowed = 1.5 * relative_error(single[name].double(), want[name])
        assert relative_error(got[name].double(), want[name]) < allowed, name


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shards", [(64,) * 4, (50, 70, 3, 90), (64,) * 8])
def test_exactly_the_rows_that_others_need_travel(ranks, shards, is_causal):
    case = Case(((32, 1), (128, 4), (96, 5)), shards, kv_heads=2, group=2, head_dim=8, is_causal=is_causal)
    counted = ranks(len(shards), bytes_sent, case)
    pattern, heads, starts = case.pattern, 4, [sum(shards[:rank]) for rank in range(len(shards) + 1)]
    owner = [rank for rank, length in enumerate(shards) for _ in range(length)]
    needed = [set() for _ in shards]
    for index, branch in enumerate(pattern.branches):
        for head in range(heads):
            chosen = [p for p in range(starts[-1]) if pattern.selects(branch, head, heads, p)]
            for q in chosen:
                for k in chosen:
                    same = q // branch.segment_length == k // branch.segment_length
                    if same and owner[q] != owner[k] and (k <= q or not is_causal):
                        offset = pattern.offset(branch, head, heads)
                        needed[owner[k]].add((owner[q], index, head // 2, offset, k))
    row = 2 * case.head_dim * 8  # a key and a value in float64
    received = [sum(1 for rows in needed for one in rows if one[0] == rank) for rank in range(len(shards))]
    for rank, (forward, backward) in enumerate(counted):
        assert forward[rank] == backward[rank] == 0
        assert sum(forward) == len(needed[rank]) * row
        assert sum(backward) == received[rank] * row


def refusal(group, rank, changes):
    """The call of a rank that differs from the others by ``changes[rank]``."""
    settings = {"dtype": torch.float32, "heads": 2, "rates": (1, 2), "is_causal": True, "dim": 4, "mask": None}
    settings |= changes.get(rank, {})
    x = torch.ones(1, settings["heads"], 8, settings["dim"], dtype=settings["dtype"])
    dilated_attention(
        x,
        x,
        x,
        (4, 8),
        settings["rates"],
        is_causal=settings["is_causal"],
        key_padding_mask=settings["mask"],
        group=group,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float32 on rank 0, torch.float64 on rank 1"),
        ({"heads": 4}, "heads is 2 on rank 0, 4 on rank 1"),
        ({"rates": (1, 4)}, "pattern is"),
        ({"is_causal": False}, "is_causal is True on rank 0, False on rank 1"),
        ({"mask": torch.zeros(1, 8, dtype=torch.bool)}, "mask is False on rank 0, True on rank 1"),
        ({"mask": torch.zeros(1, 9, dtype=torch.bool)}, "key_padding_mask has shape (1, 9)"),
        ({"rates": (1, 0)}, "expected integers of at least 1"),
        ({"dtype": torch.int64}, "expected float64, float32"),
    ],
)
def test_what_one_rank_gets_wrong_raises_on_every_rank(ranks, change, said):
    for ok, error in ranks.outcomes(3, refusal, {1: change}):
        assert not ok and said in error, error
    # And they can go on.
    compare(ranks, Case(((16, 1), (64, 4)), (32, 32, 32)))


def twice(group, rank, case):
    return [run_shard(group, rank, case) for _ in range(2)]


def test_two_runs_are_bit_identical(ranks):
    """With heads that share keys, rows that several ranks need, and shards that begin between the rows of a rate."""
    case = Case(
        ((16, 1), (96, 4), (200, 8)), (33, 64, 47, 80), kv_heads=2, group=4, dtype=torch.float32, is_causal=False
    )
    for one, other in ranks(4, twice, case):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_group_that_agrees_over_the_gpu_is_told_of(caplog):
    with caplog.at_level("WARNING", logger="longnet"):
        assert _talks_on_the_host("cpu:gloo,cuda:nccl") and _talks_on_the_host("gloo") and not caplog.text
        assert not _talks_on_the_host("nccl")
    assert "cpu:gloo,cuda:nccl" in caplog.text
