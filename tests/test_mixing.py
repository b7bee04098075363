"""Merging by lse against one softmax over everything."""

from __future__ import annotations

import torch

from longnet.attention import merge


def attend(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def test_merging_in_any_order_is_one_softmax():
    torch.manual_seed(0)
    scores = [torch.randn(5, n, dtype=torch.float64) * 20 for n in (3, 7, 1)]
    values = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 7, 1)]
    expected, expected_lse = attend(torch.cat(scores, -1), torch.cat(values))
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        out, lse = torch.zeros(5, 4, dtype=torch.float64), torch.full((5,), -torch.inf, dtype=torch.float64)
        for i in order:
            merge.merge_(out, lse, *attend(scores[i], values[i]))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)


def test_rows_without_keys_weigh_nothing():
    out, lse = torch.zeros(3, 2), torch.full((3,), -torch.inf)
    part, part_lse = torch.ones(3, 2), torch.tensor([-torch.inf, 1.0, 200.0])
    merge.merge_(out, lse, part, part_lse)
    assert torch.equal(out, torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(lse, part_lse)
    merge.merge_(out, lse, torch.full((3, 2), 7.0), torch.full((3,), -torch.inf))
    assert torch.equal(out[1:], torch.ones(2, 2)) and torch.equal(lse, part_lse)


def test_a_half_precision_part_is_mixed_in_float32():
    out, lse = torch.zeros(1, 1), torch.zeros(1)
    merge.merge_(out, lse, torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([-8.0]))
    torch.testing.assert_close(out, torch.tensor([[1 / (1 + torch.tensor(8.0).exp().item())]]))


def test_extreme_denominators_do_not_overflow():
    out, lse = torch.zeros(2, 1), torch.tensor([1e4, -1e4])
    merge.merge_(out, lse, torch.ones(2, 1), torch.tensor([-1e4, 1e4]))
    assert torch.equal(out, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(lse, torch.tensor([1e4, 1e4]))
