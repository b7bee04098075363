"""What transformers' own tests ask of saving and loading; the table is in test_generic_models.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from longnet_models import HEADS, MODELS, VOCABULARY, architecture, config, first, make, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longnet import LongNetLM

TIED = ("LongNetForCausalLM", "LongNetForMaskedLM")


def saved_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, ids = make(name), tokens()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"])
    assert not again.training and all(p.is_contiguous() for p in again.parameters())
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))


def test_a_reload_has_the_pattern(tmp_path: Path) -> None:
    """What is saved is dilated again, by whatever class it is loaded."""
    ids = tokens(2, 60)
    model, dense = make(), make(segment_lengths=(64,), dilation_rates=(1,))
    dense.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))
    assert (first(again, input_ids=ids) - first(dense, input_ids=ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_shards(name: str, tmp_path: Path) -> None:
    model, ids = make(name), tokens()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))


def test_a_config_survives_json(tmp_path: Path) -> None:
    given = config(qk_norm=True, norm="rms", use_xpos=False, num_labels=5, name_of_mine="kept")
    given.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(given) and again.to_diff_dict() == given.to_diff_dict() and again.num_labels == 5
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longnet"
    assert copy.deepcopy(given).to_dict() == given.to_dict()
    assert again.to_longnet() == given.to_longnet()


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_saved_once_and_not_missed(name: str, tmp_path: Path) -> None:
    model = make(name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    tables = [place for place in saved_names(tmp_path) if place.endswith(("lm_head.weight", "embedding.weight"))]
    assert len(tables) == 1
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert not told["missing_keys"]


@pytest.mark.parametrize("name", TIED)
def test_untied_weights_are_saved_both(name: str, tmp_path: Path) -> None:
    model, ids = make(name, tie_word_embeddings=False), tokens()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))


def test_a_body_loads_from_a_folder_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    model, ids = make(), tokens()
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(first(body, input_ids=ids), first(model.base_model, input_ids=ids))
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))


@pytest.mark.parametrize("name", MODELS)
def test_missing_weights_are_drawn_as_fresh_ones(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    kept = {place: x for number, (place, x) in enumerate(sorted(held.items())) if number % 2}
    save_file(kept, file, metadata={"format": "pt"})
    torch.manual_seed(7)
    again = type(model).from_pretrained(tmp_path)
    fresh = type(model)(model.config)
    for place, x in again.state_dict().items():
        if place in kept:
            assert torch.equal(x, kept[place]), place
            continue
        if place in held:
            expected = fresh.state_dict()[place]
            assert x.isfinite().all(), place
            if x.numel() < 500:
                # A norm's or a bias's: no chance in them.
                assert place.endswith("score.weight") or torch.equal(x, expected), place
            else:
                assert not torch.equal(x, held[place]), place
                torch.testing.assert_close(x.std(), expected.std(), rtol=0.15, atol=0)


def test_fresh_weights_are_the_plain_models() -> None:
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256, "num_key_value_heads": 4}
    model = make(**shape)
    plain = LongNetLM(model.config.to_longnet()).state_dict()
    for place, x in model.model.stack.state_dict().items():
        if x.numel() < 500:
            assert torch.equal(x, plain[place]), place
        else:
            assert not torch.equal(x, plain[place]), place
            torch.testing.assert_close(x.std(), plain[place].std(), rtol=0.05, atol=0)


def test_running_statistics_are_loaded(tmp_path: Path) -> None:
    model = make("LongNetForMaskedLM", norm="batch").train()
    model(tokens())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(first(again, input_ids=tokens()), first(model.eval(), input_ids=tokens()))


@pytest.mark.parametrize("name", HEADS)
def test_mismatched_shapes_are_refused_or_drawn_afresh(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    other = {"num_labels": 7} if name == "LongNetForSequenceClassification" else {"vocab_size": VOCABULARY + 3}
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path, **other)
    again = type(model).from_pretrained(tmp_path, **other, ignore_mismatched_sizes=True)
    first_block = "model.stack.blocks.0.attention.q_proj.weight"
    own, expected = again.state_dict(), model.state_dict()
    same = [place for place, x in own.items() if x.shape == expected[place].shape]
    assert first_block in same and len(same) < len(own)
    assert all(torch.equal(own[place], expected[place]) for place in same)
    assert first(again, input_ids=tokens()).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_it_is_built_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = architecture(name)(config(name))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_loads_under_the_meta_device(name: str, device: str, tmp_path: Path) -> None:
    model, ids = make(name), tokens()
    model.save_pretrained(tmp_path)
    with torch.device(device):
        if device == "meta":
            with pytest.raises(RuntimeError, match="meta"):
                type(model).from_pretrained(tmp_path)
            return
        again = type(model).from_pretrained(tmp_path)
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_loads_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = make(), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    torch.testing.assert_close(first(again, input_ids=ids).float(), first(model, input_ids=ids), rtol=0, atol=0.06)
    again.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_loads_without_a_folder(name: str, tmp_path: Path) -> None:
    model, ids = make(name), tokens()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    read = torch.load(tmp_path / "weights.pt", weights_only=True)
    again = type(model).from_pretrained(None, config=model.config, state_dict=read)
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))
