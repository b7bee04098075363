"""Settings refuse what cannot be meant, and know what a resumed run may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet.models import LongNetConfig
from longnet.training import TrainSettings
from longnet.training.device import choose_dtype, resolve_device
from longnet.training.settings import changed_settings

Make = Callable[..., TrainSettings]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps=None and minutes=None"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"minutes": 0.0}, "minutes=0.0: expected above 0"),
        ({"context": 0}, "context=0: expected at least 1"),
        ({"batch": -1}, "batch=-1"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"lr": 0.0}, "lr=0.0: expected above 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"lr_floor": 1.5}, "lr_floor=1.5: expected at least 0 and at most 1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808 is too large"),
        ({"threads": 0}, "threads=0"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"optimizer": "sgd"}, r"optimizer='sgd' is unknown: expected one of \('adamw', 'muon'\)"),
        ({"optimizer": "muon", "matrix_lr": 0.0}, "matrix_lr=0.0: expected above 0"),
        ({"matrix_lr": 0.01}, "matrix_lr=0.01 with optimizer='adamw': expected optimizer='muon'"),
        ({"weights": "float16"}, "weights='float16' is unknown"),
        ({"weights": "bfloat16"}, "weights='bfloat16' with dtype='float32': expected dtype='bfloat16' too"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        (
            {"track": "paper"},
            r"track='paper' is unknown: expected one of \('none', 'tensorboard', 'wandb', 'trackio'\)",
        ),
        ({"model": LongNetConfig.preset("nano", causal=False)}, "causal=False"),
    ],
)
def test_a_bad_value_is_named(make_settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1.5},
        {"batch": True},
        {"lr": "0.1"},
        {"field": 3},
        {"out": None},
        {"tokenizer": None},
        {"data": ["one.txt"]},
        {"model": "nano"},
    ],
)
def test_a_wrong_type_is_named(make_settings: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(changes))}="):
        make_settings(**changes)


def test_paths_may_be_path_objects(make_settings: Make) -> None:
    names = ("out", "data", "tokenizer", "init_from")
    settings = make_settings(**{name: Path(name) for name in names})
    assert [getattr(settings, name) for name in names] == list(names)


def test_settings_survive_json(make_settings: Make) -> None:
    settings = make_settings(minutes=2.5, lr=1 / 3)
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_an_unknown_setting_is_named(make_settings: Make) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainSettings.from_dict({**make_settings().to_dict(), "learning_rate": 0.1})


def test_what_changes_the_losses_is_listed_and_what_does_not_is_free(make_settings: Make) -> None:
    saved = make_settings()
    asked = saved.replace(seed=1, batch=3, model=saved.model.replace(layers=2))
    assert changed_settings(saved, asked) == [
        "model layers was 1, now 2",
        "batch was 2, now 3",
        "seed was 0, now 1",
    ]
    free = {"threads": 2, "compile": True, "save_every": 1, "eval_every": 1, "out": "elsewhere", "track": "wandb"}
    assert changed_settings(saved, saved.replace(**free)) == []


def test_the_optimizer_and_its_rate_change_the_losses(make_settings: Make) -> None:
    saved = make_settings(optimizer="muon")
    assert changed_settings(saved, saved.replace(matrix_lr=0.01)) == ["matrix_lr was None, now 0.01"]
    assert changed_settings(saved, saved.replace(optimizer="adamw")) == ["optimizer was 'muon', now 'adamw'"]


def test_matrices_learn_three_times_as_fast_unless_told(make_settings: Make) -> None:
    assert make_settings(optimizer="muon", lr=0.25).peak_matrix_lr == 0.75
    assert make_settings(optimizer="muon", lr=0.25, matrix_lr=0.5).peak_matrix_lr == 0.5


def test_a_run_from_before_the_choice_of_optimizers_goes_on_with_adamw(make_settings: Make) -> None:
    values = make_settings().to_dict()
    del values["optimizer"], values["matrix_lr"]
    assert TrainSettings.from_dict(values).optimizer == "adamw"


def test_progress_is_of_steps_or_minutes_whichever_is_larger(make_settings: Make) -> None:
    settings = make_settings(steps=100, minutes=1.0)
    assert settings.progress(50, 6.0) == 0.5
    assert settings.progress(50, 54.0) == 0.9


def test_devices() -> None:
    assert resolve_device("cpu", "bfloat16").type == "cpu"
    with pytest.raises(ValueError, match="device='abacus' cannot be used"):
        resolve_device("abacus", "float32")
    with pytest.raises(ValueError, match="loss scaling"):
        resolve_device("cpu", "float16")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True}, "float32"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_bfloat16_is_chosen_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("cpu") == dtype
