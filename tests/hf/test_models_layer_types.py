"""LongNets of Hugging Face whose layers are of several types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from longnet_models import config, make, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import longnet
from longnet.hf import LongNetCache, LongNetConfig, LongNetForCausalLM
from longnet.hf.transformers_internals import CACHE

TYPES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "strided_attention", "shifted_dilated_attention", "full_attention"],
    "sliding_window": 6,
    "stride": 2,
    "stride_block": 2,
    "shift_keys": True,
    "far_positions": False,
}
WITHOUT_DILATION: dict[str, Any] = {
    **TYPES,
    "layer_types": ["sliding_attention", "strided_attention"],
    "segment_lengths": [],
    "dilation_rates": [],
}


def model_of(**changes: Any) -> LongNetForCausalLM:
    model: LongNetForCausalLM = make(**{**TYPES, **changes}).double()
    return model


@pytest.mark.parametrize("changes", [TYPES, WITHOUT_DILATION])
def test_a_config_says_one_type_for_every_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    made = config(**changes)
    assert made.layer_types == (list(changes["layer_types"]) * 4)[:4]
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_longnet() == made.to_longnet()
    assert made.to_longnet().layer_types == tuple(made.layer_types)
    assert LongNetConfig.from_longnet(made.to_longnet()).to_longnet() == made.to_longnet()


def test_a_window_of_an_encoder_counts_one_side() -> None:
    """A query's own key apart, as in transformers."""
    types: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 3}
    model = make("LongNetForMaskedLM", **types, segment_lengths=[], dilation_rates=[]).double()
    x = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=x).logits[0, 6].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().amax(1).nonzero().flatten().tolist() == list(range(3, 10))
    plain = model.config.to_longnet()
    assert plain.sliding_window == 4
    assert LongNetConfig.from_longnet(plain).sliding_window == 3


@pytest.mark.parametrize("changes", [{}, WITHOUT_DILATION])
def test_a_saved_model_is_loaded_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(**{**TYPES, **changes})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        plain = longnet.LongNetLM(model.config.to_longnet()).eval()
        plain.load_state_dict(
            {name.removeprefix("model.stack."): x for name, x in model.state_dict().items()}, strict=False
        )
        assert torch.equal(plain(ids), model(ids).logits)


@pytest.mark.parametrize("changes", [{}, WITHOUT_DILATION])
def test_chunks_read_into_a_cache_give_what_one_forward_gives(changes: dict[str, Any]) -> None:
    model, ids = model_of(**changes), tokens(length=60)
    options: dict[str, Any] = {"use_cache": True, CACHE: LongNetCache()}
    with torch.no_grad():
        parts = [model(chunk, **options).logits for chunk in ids.split((20, 1, 1, 17, 21), 1)]
        assert (torch.cat(parts, 1) - model(ids).logits).abs().max() < 1e-10


@pytest.mark.parametrize(
    "changes", [{}, WITHOUT_DILATION, {"layer_types": None, "shift_keys": False, "far_positions": True}]
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_rows_padded_on_the_left_continue_as_they_do_alone(changes: dict[str, Any], options: dict[str, Any]) -> None:
    model, ids = model_of(**changes), tokens(batch=1 if "prompt_lookup_num_tokens" in options else 2, length=30)
    mask = torch.ones_like(ids)
    mask[-1, :11] = 0
    sampled: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, **options}
    together = model.generate(ids, attention_mask=mask, **sampled)
    alone = model.generate(ids[-1:, 11:], **sampled)
    assert torch.equal(together[-1, 11:], alone[0])


@pytest.mark.parametrize(
    "changes", [{}, WITHOUT_DILATION, {"layer_types": None, "shift_keys": False, "far_positions": True}]
)
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(changes: dict[str, Any]) -> None:
    model, ids = model_of(**changes), tokens(batch=2, length=40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        assert (together[1:, 13:] - model(ids[1:, 13:]).logits).abs().max() < 1e-10
        assert (together[:1] - model(ids[:1]).logits).abs().max() < 1e-10


def test_the_cache_of_others_is_refused() -> None:
    model, ids = model_of(), tokens()
    with pytest.raises(TypeError, match="expected a longnet.hf.LongNetCache"):
        model(ids, use_cache=True, **{CACHE: DynamicCache()})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_types": "full_attention"}, TypeError, "layer_types='full_attention' has type str"),
        ({"layer_types": 5}, TypeError, "layer_types=5 has type int: expected a list of layer types, or None"),
        ({"layer_types": {"a": 1}}, TypeError, "has type dict: expected a list"),
        ({"layer_types": ["linear_attention"]}, ValueError, "layer_types holds 'linear_attention'"),
        ({"layer_types": ["full_attention"] * 3}, ValueError, "has 3 entries: expected a number that divides"),
        ({"sliding_window": 0}, ValueError, "sliding_window=0"),
        ({"sliding_window": 4.0}, TypeError, "sliding_window=4.0"),
        ({"stride": 0}, ValueError, "stride=0"),
        ({"stride_block": True}, TypeError, "stride_block=True"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**{**TYPES, **changes})
