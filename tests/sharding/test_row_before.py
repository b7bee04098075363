"""The row before a shard, with its gradient."""

from __future__ import annotations

import pytest
import torch

from longnet.attention.sharding import row_before


def shifted(group, rank, lengths, dtype):
    """A shift by one token over shards, weighted, and the gradient of the shard."""
    x, weight = (one.to(dtype).split(lengths, 2)[rank].contiguous() for one in whole(sum(lengths)))
    x.requires_grad_()
    before = row_before(x, group)
    assert before.shape == (2, 3, 1, 5) and before.dtype == dtype
    # Empty shards use it too: every rank runs the backward pass.
    out = torch.cat((before, x), 2)[:, :, : x.shape[2]]
    (grad,) = torch.autograd.grad(out, x, weight)
    return before.detach(), out.detach(), grad


def whole(length):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, length, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths",
    [
        (4,),
        (0,),
        (3, 4),
        (0, 4),
        (4, 0),
        (0, 0),
        (2, 0, 3),
        (0, 2, 1),
        (2, 0, 0, 3),
        (1, 1, 1, 1),
        (0, 3, 0, 2),
        (0, 0, 5, 0),
    ],
)
def test_a_shift_over_shards_is_that_of_one_device(ranks, lengths, dtype):
    x, weight = (one.to(dtype) for one in whole(sum(lengths)))
    results = ranks(len(lengths), shifted, lengths, dtype)
    zero = x.new_zeros(2, 3, 1, 5)
    out, grad = torch.cat((zero, x), 2)[:, :, : sum(lengths)], torch.cat((weight, zero), 2)[:, :, -sum(lengths) :]
    if not sum(lengths):
        grad = weight
    assert torch.equal(torch.cat([one[1] for one in results], 2), out)
    assert torch.equal(torch.cat([one[2] for one in results], 2), grad)
    for rank, (before, *_) in enumerate(results):
        place = sum(lengths[:rank])
        assert torch.equal(before, x[:, :, place - 1 : place] if place else zero)


def all_read(group, rank, lengths):
    """Every rank's loss reads the row before it, empty shards' too."""
    x = torch.ones(1, 1, lengths[rank], 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((row_before(x, group) * (rank + 1)).sum(), x)
    return grad


def test_several_ranks_may_read_one_row(ranks):
    grads = ranks(4, all_read, (2, 0, 0, 3))
    assert grads[0].tolist() == [[[[0, 0], [9, 9]]]] and not grads[3].any()


def in_a_graph(group, rank):
    x = torch.arange(6.0).view(1, 1, 3, 2) + 10 * rank

    def double(x):
        return row_before(2 * x, group) + 1

    return torch.compile(double, backend="aot_eager")(x)


def test_a_compiled_graph_breaks_around_it(ranks):
    first, second = ranks(2, in_a_graph)
    assert first.tolist() == [[[[1, 1]]]] and second.tolist() == [[[[9, 11]]]]


def refused(group, rank, what):
    x = torch.ones(1, 2, 3, 4)
    if rank == 1:
        x = {"heads": x[:, :1], "dtype": x.double(), "gradients": x.requires_grad_(), "shape": x[0], "ints": x.int()}[
            what
        ]
    row_before(x, group)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("heads", "heads is 2 on rank 0, 1 on rank 1"),
        ("dtype", "dtype is torch.float32 on rank 0, torch.float64 on rank 1"),
        ("gradients", "gradients is False on rank 0, True on rank 1"),
        ("shape", "x has shape (2, 3, 4): expected 4 dimensions (B, h, n, d)"),
        ("ints", "x has dtype torch.int32: expected float64"),
    ],
)
def test_what_one_rank_gets_wrong_raises_on_every_rank(ranks, what, said):
    for ok, error in ranks.outcomes(3, refused, what):
        assert not ok and said in error, error


def without_rows(group, rank):
    x = torch.ones(0, 2, 3, 4, requires_grad=True)
    row = row_before(x, group)
    row.sum().backward()
    return row.shape, x.grad.shape


def test_no_sequence_gives_none(ranks):
    assert ranks(3, without_rows) == [((0, 2, 1, 4), (0, 2, 3, 4))] * 3
