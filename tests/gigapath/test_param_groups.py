"""Layer-wise learning-rate decay: which parameter learns how fast, restated from names."""

from __future__ import annotations

import re

import pytest
import torch
from slides import encoder, slides
from torch import nn

from longnet.gigapath import ClassificationHead, SlideEncoder, param_groups_lrd

LAYERS = 3


def depth_of(name: str) -> int:
    """From the name alone: 0 for what comes before the blocks, LAYERS + 1 for what comes after."""
    if "cls_token" in name or "patch_embed" in name:
        return 0
    number = re.search(r"\.blocks\.(\d+)\.", name)
    return LAYERS + 1 if number is None else int(number[1]) + 1


def head(**options: bool) -> ClassificationHead:
    return ClassificationHead(encoder(LAYERS, torch.float32, dropout=0.0, drop_path=0.0), 2, **options)


@pytest.mark.parametrize("layer_decay", [0.5, 0.95, 1.0])
def test_every_trained_parameter_is_in_the_group_of_its_depth(layer_decay: float) -> None:
    model = head()
    groups = param_groups_lrd(model, 0.05, ["encoder.cls_token"], layer_decay, lr=2e-3)
    place = {id(one): group for group in groups for one in group["params"]}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(place) == len(trained)
    for name, one in trained.items():
        scale = layer_decay ** (LAYERS + 1 - depth_of(name))
        group = place[id(one)]
        assert group["lr"] == pytest.approx(2e-3 * scale) and group["lr_scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == (0.0 if one.ndim == 1 or name == "encoder.cls_token" else 0.05), name
    assert place[id(model.linear.weight)]["lr"] == 2e-3


def test_a_frozen_encoder_leaves_the_head() -> None:
    groups = param_groups_lrd(head(freeze=True), lr=1.0)
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert all(group["lr"] == 1.0 for group in groups)


def test_a_step_of_sgd_moves_each_parameter_by_its_rate() -> None:
    model = head()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups_lrd(model, 0.0, layer_decay=0.5, lr=1e-2))
    model.loss(model(*slides(9, 2, torch.float32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    for name, one in model.named_parameters():
        if one.requires_grad:
            expected = before[name] - 1e-2 * 0.5 ** (LAYERS + 1 - depth_of(name)) * one.grad
            torch.testing.assert_close(one.detach(), expected)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="model holds 0 slide encoders: expected exactly one"):
        param_groups_lrd(nn.Linear(2, 2), lr=1.0)
    with pytest.raises(ValueError, match="model holds 2 slide encoders"):
        param_groups_lrd(nn.ModuleList([SlideEncoder(32, 1), SlideEncoder(32, 1)]), lr=1.0)
    with pytest.raises(ValueError, match="layer_decay=0.0: expected above 0 and at most 1"):
        param_groups_lrd(head(), layer_decay=0.0, lr=1.0)
    with pytest.raises(ValueError, match="no_weight_decay_list holds \\['cls_token'\\]: expected names"):
        param_groups_lrd(head(), no_weight_decay_list=["cls_token"], lr=1.0)
