"""``longnet.hf.load`` takes what ``from_pretrained`` takes: fields of the config, where the folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from apply_models import llama, make
from longnet_models import make as make_longnet
from longnet_models import tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification
from transformers.models.llama import modeling_llama

from longnet.hf import apply, load, restore


def saved(folder: Path) -> Any:
    torch.manual_seed(0)
    model = apply(llama().eval(), [8, 32], [1, 2])
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, LlamaForSequenceClassification])
def test_fields_of_the_config_are_taken(kind: Any, tmp_path: Path) -> None:
    model = saved(tmp_path)
    again = load(
        tmp_path, kind, num_labels=3, problem_type="regression", dtype=torch.bfloat16, output_hidden_states=True
    )
    assert (again.num_labels, again.config.problem_type, again.dtype) == (3, "regression", torch.bfloat16)
    given = again(tokens(1, 50))
    assert given.logits.shape == (1, 3)
    # The weights are the saved ones, the attention is dilated.
    expected = model.model(tokens(1, 50)).last_hidden_state
    torch.testing.assert_close(given.hidden_states[-1].float(), expected, rtol=0.1, atol=0.1)
    assert again.config.longnet["segment_lengths"] == [8, 32]


def test_the_loaded_dtype_is_the_asked_one_and_by_default_the_saved_one(tmp_path: Path) -> None:
    saved(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32


def test_a_subfolder_is_found(tmp_path: Path) -> None:
    model = saved(tmp_path / "inside")
    again = load(tmp_path, subfolder="inside", attn_implementation="eager")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_an_implementation_is_for_layers_that_are_not_dilated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    apply(llama().eval(), [8, 32], [1, 2], layers=[1]).save_pretrained(tmp_path)
    again, calls = load(tmp_path, attn_implementation="eager").eval(), []
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama, "eager_attention_forward", lambda *args, **given: calls.append(args[0]) or eager(*args, **given)
    )
    again(tokens())
    assert calls == [again.model.layers[0].self_attn, again.model.layers[2].self_attn]
    assert restore(again).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation='longnet_dilated' was set before longnet.hf.apply"):
        load(tmp_path, attn_implementation="longnet_dilated")


def test_attention_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="output_attentions=True in a dilated model: attention weights are never made"):
        load(tmp_path, output_attentions=True, attn_implementation="eager")
    assert load(tmp_path, output_attentions=False)(tokens()).attentions is None


def test_a_config_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="config given: the folder's own holds the pattern; expected its fields"):
        load(tmp_path, config=model.config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000: expected at most 65536"),
        ("hidden_size", 10**12, "hidden_size=1000000000000 ask"),
        ("intermediate_size", 10**18, "hidden_size=32 and intermediate_size=1000000000000000000 ask"),
        ("vocab_size", 10**18, "hidden_size=32 and vocab_size=1000000000000000000 ask"),
    ],
)
@pytest.mark.parametrize("kind", ["longnet", "dilated"])
def test_sizes_that_no_machine_can_make_are_refused_at_once(
    kind: str, name: str, value: int, message: str, tmp_path: Path
) -> None:
    model = make_longnet() if kind == "longnet" else apply(make("llama"), 8, 1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    # A dilated model's entry holds the number of layers.
    holder = config["longnet"] if name == "num_hidden_layers" and kind == "dilated" else config
    assert name in holder
    holder[name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        (AutoModelForCausalLM.from_pretrained if kind == "longnet" else load)(tmp_path)
