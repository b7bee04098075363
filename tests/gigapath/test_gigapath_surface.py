"""The public names and signatures of the slide encoder, torchscale's checkpoints and slides, exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import longnet.compat
import longnet.gigapath
import longnet.slides
import longnet.slides.finetune
from longnet.gigapath import ClassificationHead, SlideEncoder

NAMES: list[tuple[ModuleType, list[str]]] = [
    (
        longnet.compat,
        [
            *(
                "LongViT",
                "decoder_from_torchscale",
                "encoder_from_torchscale",
                "longvit_from_torchscale",
                "to_torchscale",
            ),
            "torchscale_attention",
        ],
    ),
    (
        longnet.gigapath,
        [
            *("ARCHITECTURES", "ClassificationHead", "RegressionHead", "SlideEncoder", "SurvivalHead"),
            *("drop_in", "from_finetuned", "param_groups_lrd", "slide_outputs"),
        ],
    ),
    (
        longnet.slides,
        [
            *("SLIDE_FORMATS", "Slide", "heatmap", "is_made_from", "join_slides", "read_patients", "read_slide"),
            "result_bytes",
        ],
    ),
    (longnet.slides.finetune, ["FinetuneSettings", "Outcome", "finetune"]),
]

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (
        longnet.compat.torchscale_attention,
        "(query, key, value, segment_lengths, dilation_rates, *, is_causal=False, scale=None, key_padding_mask=None, "
        "return_lse=False, backend='auto')",
    ),
    (
        longnet.compat.encoder_from_torchscale,
        "(weights, *, heads, segment_lengths, dilation_rates, torchscale_compat=True, scale_embedding=False, "
        "xpos_scale_base=512.0)",
    ),
    (
        SlideEncoder.from_checkpoint,
        "(path_or_state_dict, arch='gigapath_slide_enc12l768d', *, max_wsi_size=None, tile_size=256, slide_ngrids=1000, "
        "global_pool=False, torchscale_compat=True, dropout=0.25, drop_path=0.1, recompute='ffn', "
        "compiled=False, cuda_graphs=False, device=None)",
    ),
    (longnet.gigapath.drop_in, "(*, replace=False)"),
    (
        longnet.gigapath.from_finetuned,
        "(path_or_state_dict, arch='gigapath_slide_enc12l768d', *, layers, setting=None, max_wsi_size=None, tile_size=256, "
        "global_pool=False, freeze=False, device=None)",
    ),
    (longnet.gigapath.slide_outputs, "(model, x, coords, outputs)"),
    (SlideEncoder.forward, "(self, x, coords, all_layer_embed=False, padding_mask=None, *, layers=None)"),
    (SlideEncoder.attention_weights, "(self, x, coords, padding_mask=None)"),
    (ClassificationHead.__init__, "(self, encoder, outputs, *, layers=(-1,), freeze=False, setting=None)"),
    (ClassificationHead.loss, "(self, logits, target)"),
    (longnet.slides.read_slide, "(path, *, unit=None, mpp=None)"),
    (longnet.slides.join_slides, "(slides, tile_size, names=())"),
    (
        longnet.gigapath.param_groups_lrd,
        "(model, weight_decay=0.05, no_weight_decay_list=(), layer_decay=0.75, *, lr)",
    ),
    (longnet.slides.heatmap, "(path, weights, coords, *, tile_size=256, title='', label='attention')"),
]


@pytest.mark.parametrize(("module", "names"), NAMES, ids=[module.__name__ for module, _ in NAMES])
def test_names(module: ModuleType, names: list[str]) -> None:
    assert sorted(module.__all__) == sorted(names)
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=[one.__qualname__ for one, _ in SIGNATURES])
def test_signatures(function: Callable[..., Any], expected: str) -> None:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == expected
