"""Full layers get windows, the cheapest first: the order, its limits, and a model that reads far in one layer."""

from __future__ import annotations

import itertools

import pytest
import torch

from longnet import LongNetConfig, LongNetLM
from longnet.models.window_layers import window_layers

FULL = ("full_attention",) * 4


def additive(cost):
    return lambda types: sum(cost[at] for at, name in enumerate(types) if name == "sliding_attention")


def test_each_step_takes_the_layer_that_costs_least():
    cost = {0: 3.0, 1: 0.5, 2: 2.0, 3: 1.0}
    calls = []

    def loss(types):
        calls.append(types)
        # A window at 2 costs more once 3 has one.
        return additive(cost)(types) + 5 * (types[2] == types[3] == "sliding_attention")

    steps = list(window_layers(FULL, loss))
    assert [(step.layer, step.full_layers, step.loss) for step in steps] == [
        (1, (0, 2, 3), 0.5),
        (3, (0, 2), 1.5),
        (0, (2,), 4.5),
    ]
    assert len(calls) == 4 + 3 + 2 and steps[-1].layer_types[2] == "full_attention"


@pytest.mark.parametrize("seed", range(5))
def test_without_interaction_the_choice_is_the_best_of_all(seed):
    cost = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
    loss = additive(dict(enumerate(cost)))
    for step in window_layers(("full_attention",) * 6, loss, full=0):
        count = len(step.full_layers)
        best = min(itertools.combinations(range(6), count), key=lambda full: sum(cost) - sum(cost[at] for at in full))
        assert step.full_layers == best and step.loss == pytest.approx(sum(cost) - sum(cost[at] for at in best))


def test_other_layers_stay_as_they_are():
    types = ("sliding_attention", "full_attention", "strided_attention", "full_attention")
    (step,) = window_layers(types, additive(dict.fromkeys(range(4), 1.0) | {3: 0.5}))
    assert step.layer_types == ("sliding_attention", "full_attention", "strided_attention", "sliding_attention")


@pytest.mark.parametrize(("full", "words"), [(4, "full=4: expected from 0 to 3"), (-1, "full=-1: expected at least 0")])
def test_a_number_that_leaves_nothing_to_do_is_refused(full, words):
    with pytest.raises(ValueError, match=words):
        next(window_layers(FULL, lambda types: 0.0, full=full))


@pytest.mark.parametrize(
    ("types", "kind", "words"),
    [
        ("full_attention", TypeError, "has type str: expected a tuple of layer types"),
        (("full",) * 4, ValueError, "layer_types holds 'full': expected one of"),
        (("sliding_attention",) * 4, ValueError, "has no full layer: expected some that can get windows"),
    ],
)
def test_types_without_a_full_layer_are_refused(types, kind, words):
    with pytest.raises(kind, match=words):
        next(window_layers(types, lambda types: 0.0))


def test_a_loss_may_be_a_tensor():
    loss = additive(dict.fromkeys(range(4), torch.tensor(1.5)))
    assert isinstance(next(window_layers(FULL, loss)).loss, float)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"loss is \{2: nan\} with a window in these layers"):
        next(window_layers(FULL, lambda types: float("nan") if types[2] == "sliding_attention" else 1.0))


def test_the_layer_of_a_model_that_reads_far_stays_full():
    """Only layer 1 has attention that reaches the output; a window there alone changes the model."""
    torch.manual_seed(0)
    config = LongNetConfig(dim=16, heads=2, layers=3, layer_types=FULL[:1], sliding_window=4)
    dense = LongNetLM(config).eval()
    with torch.no_grad():
        for at in (0, 2):
            dense.blocks[at].attention.out_proj.weight.zero_()
            dense.blocks[at].attention.out_proj.bias.zero_()
    tokens = torch.randint(256, (2, 40))
    expected = dense(tokens)

    def loss(types):
        model = LongNetLM(config.replace(layer_types=types)).eval()
        model.load_state_dict(dense.state_dict())
        with torch.no_grad():
            return float((model(tokens) - expected).square().mean())

    steps = list(window_layers(FULL[:3], loss))
    assert steps[-1].full_layers == (1,) and steps[-1].loss < 1e-10
    assert loss(("full_attention", "sliding_attention", "full_attention")) > 1e-6
