"""Reading a model back refuses what is no model of longnet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    with pytest.raises(ValueError, match="is no folder: expected the --out folder of longnet train"):
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


def test_a_model_of_another_config(run: Path) -> None:
    config = run / "config.json"
    config.write_text(config.read_text().replace('"layers": 1', '"layers": 2'))
    with pytest.raises(CheckpointError, match=r"does not fit the model: it lacks blocks\.1"):
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


def test_only_language_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model has type LongNetEncoder: expected a LongNetLM"):
        save_model(LongNetEncoder(LongNetConfig.preset("nano", causal=False)), tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()
