"""T5's buckets, against the formula written out."""

from __future__ import annotations

import pytest
import torch

from longnet.nn.position import RelativeBias, relative_buckets


def test_small_distances_have_buckets_of_their_own_and_far_ones_share():
    distance = torch.arange(-300, 301)
    buckets = relative_buckets(distance, is_causal=True, num_buckets=32, max_distance=128)
    by_distance = dict(zip(distance.tolist(), buckets.tolist(), strict=True))
    assert [by_distance[-d] for d in range(16)] == list(range(16))
    assert by_distance[-128] == by_distance[-300] == 31
    assert all(by_distance[d] == 0 for d in range(301))
    past = [by_distance[-d] for d in range(301)]
    assert past == sorted(past) and set(past) == set(range(32))


def test_bidirectional_buckets_split_by_direction():
    distance = torch.arange(-300, 301)
    buckets = relative_buckets(distance, is_causal=False, num_buckets=32, max_distance=128)
    by_distance = dict(zip(distance.tolist(), buckets.tolist(), strict=True))
    assert by_distance[0] == 0
    for d in range(1, 301):
        assert by_distance[d] == by_distance[-d] + 16
    assert {by_distance[-d] for d in range(301)} == set(range(16))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_table_is_read_by_distance_and_gets_gradients(is_causal):
    module = RelativeBias(3, is_causal=is_causal, num_buckets=8, max_distance=16)
    bias = module(20)
    assert bias.shape == (3, 39)
    buckets = relative_buckets(torch.arange(-19, 20), is_causal=is_causal, num_buckets=8, max_distance=16)
    assert torch.equal(bias, module.weight.detach()[buckets].T)
    bias.sum().backward()
    counts = torch.bincount(buckets, minlength=8).float()
    assert torch.equal(module.weight.grad, counts[:, None].expand(8, 3))


def test_a_billion_tokens_away_is_the_last_bucket():
    buckets = relative_buckets(torch.tensor([-(10**9), 10**9]), is_causal=False, num_buckets=32, max_distance=128)
    assert buckets.tolist() == [15, 31]
