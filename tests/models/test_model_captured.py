"""Which models may have their steps captured in a CUDA graph; what is captured needs a GPU, see test_generate_device.py."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from longnet import LongNetConfig, LongNetLM
from longnet.models import captured

META = torch.device("meta")


@pytest.fixture(scope="module")
def model() -> LongNetLM:
    return LongNetLM(LongNetConfig.preset("nano"), device="meta")


class OnMeta:
    """A device that is taken for a GPU."""

    type = "cuda"

    def __eq__(self, other):
        return other == META

    __hash__ = None


class Mine(nn.Dropout):
    pass


def hook(model):
    model.blocks[1].attention.register_forward_hook(lambda *arguments: None)


def replace_forward(model):
    model.norm.forward = lambda x: x


def replace_logits(model):
    model.logits = lambda hidden: hidden


def compile_block(model):
    model.blocks[0].compile()


def own_class(model):
    model.blocks[0].dropout = Mine()


def own_weight(model):
    class Weight(nn.Parameter):
        pass

    model.norm.weight = Weight(model.norm.weight.detach())


def elsewhere(model):
    model.blocks[0].to_empty(device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hook, "'blocks.1.attention' is hooked"),
        (replace_forward, "'norm' is hooked, compiled or replaced"),
        (replace_logits, "'' has methods of its own: ['logits']"),
        (compile_block, "'blocks.0' is hooked, compiled"),
        (own_class, "'blocks.0.dropout' is of the unknown type Mine"),
        (own_weight, "weights are of other types"),
        (elsewhere, "parts of the model are elsewhere"),
    ],
)
def test_what_a_graph_would_leave_out_is_not_captured(model, change, said, caplog):
    changed = copy.deepcopy(model)
    assert captured.can_capture(changed, OnMeta())
    change(changed)
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        assert not captured.can_capture(changed, OnMeta())
    assert said in caplog.text


def test_models_of_all_kinds_can_be_captured():
    types = {"layer_types": ("sliding_attention", "strided_attention"), "shift_keys": True, "far_positions": False}
    kinds = ({}, types, {"norm": "rms"}, {"tie_embeddings": False, "qk_norm": True})
    for options in kinds:
        model = LongNetLM(LongNetConfig.preset("nano", **options), device="meta")
        assert captured.can_capture(model, OnMeta()), options


def test_a_mode_that_looks_at_operators_is_not_passed_over(model):
    from torch.utils.flop_counter import FlopCounterMode

    assert captured.can_capture(model, OnMeta())
    with FlopCounterMode(display=False):
        assert not captured.can_capture(model, OnMeta())
    assert not captured.can_capture(model, META)
