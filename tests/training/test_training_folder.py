"""Reading a model back refuses what is no model of longnet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet.compress import prune_heads
from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.training import CheckpointError, TrainSettings, load_model, save_model, train

Make = Callable[..., TrainSettings]


@pytest.fixture
def run(make_settings: Make) -> Path:
    settings = make_settings(steps=1, eval_every=0)
    train(settings)
    return Path(settings.out)


def test_no_folder_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder: expected the --out folder of longnet train"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no run \(no run.json\)"):
        load_model(tmp_path)


def test_a_run_without_a_model_yet(run: Path) -> None:
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model yet"):
        load_model(run)
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(run)


def test_a_truncated_model(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_model(run)


def test_a_foreign_model(run: Path) -> None:
    file = run / "model.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="is not a model of longnet: its format is None"):
        load_model(run)


def _change_config(run: Path, **changes: Any) -> None:
    config = run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


def _make_version_1(run: Path) -> None:
    """What was written before the model's file had a digest and the config in it."""
    file = run / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "longnet-model-1"})


@pytest.mark.parametrize("changes", [{"layers": 2}, {"head_offsets": "blocked"}, {"dilation_rates": [1, 4]}])
def test_a_model_of_another_config(run: Path, changes: dict[str, Any]) -> None:
    _change_config(run, **changes)
    name = next(iter(changes))
    with pytest.raises(CheckpointError, match=rf"config\.json does not fit .*model\.safetensors: {name}=.*, expected "):
        load_model(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 10**9}, "layers=1000000000, expected 1"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000, expected 256"),
        ({"dim": 10**12, "heads": 10**12, "use_xpos": False}, "dim=1000000000000, expected 16"),
        ({"ffn_dim": 10**12}, "ffn_dim=1000000000000, expected"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_sizes_are_compared_before_a_model_is_made(
    run: Path, changes: dict[str, Any], message: str, version: int
) -> None:
    if version == 1:
        _make_version_1(run)
    _change_config(run, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(run)


def test_a_model_of_version_1_is_read(run: Path) -> None:
    before = load_model(run).state_dict()
    _make_version_1(run)
    after = load_model(run).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("place", [300, -1])
def test_a_flipped_bit_of_a_model_is_found(run: Path, place: int) -> None:
    file = run / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 2
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged|truncated)"):
        load_model(run)


def test_a_config_that_is_none(run: Path) -> None:
    (run / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a JSON list: expected an object"):
        load_model(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_model(run)
    (run / "config.json").write_text('{"depth": 3}')
    with pytest.raises(ValueError, match="'depth' is no field"):
        load_model(run)


def test_a_model_is_saved_for_reading_back(tmp_path: Path) -> None:
    model = prune_heads(LongNetLM(LongNetConfig.preset("nano")).eval(), {0: [1, 2]})
    save_model(model, tmp_path / "a" / "model")
    read, tokens = load_model(tmp_path / "a" / "model"), torch.randint(256, (1, 40))
    assert read.config == model.config and torch.equal(read(tokens), model(tokens))
    with pytest.raises(ValueError, match="which a run would overwrite"):
        save_model(model, tmp_path / "a" / "model")


def test_a_model_in_bfloat16_is_saved_and_read_back(tmp_path: Path) -> None:
    model = LongNetLM(LongNetConfig.preset("nano")).bfloat16().eval()
    save_model(model, tmp_path / "model")
    read, tokens = load_model(tmp_path / "model"), torch.randint(256, (1, 40))
    assert {weight.dtype for weight in read.parameters()} == {torch.bfloat16}
    assert torch.equal(read(tokens), model(tokens))


def test_other_dtypes_and_several_are_not_saved(tmp_path: Path) -> None:
    model = LongNetLM(LongNetConfig.preset("nano")).half()
    with pytest.raises(
        ValueError, match="embedding.weight of the model is torch.float16: expected all weights in torch.float32"
    ):
        save_model(model, tmp_path / "model")
    model.bfloat16().norm.float()
    with pytest.raises(
        ValueError, match="norm.weight of the model is torch.float32: expected all weights in torch.float32, or all"
    ):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_only_language_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model has type LongNetEncoder: expected a LongNetLM"):
        save_model(LongNetEncoder(LongNetConfig.preset("nano", causal=False)), tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()
