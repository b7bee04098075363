"""Callbacks and trackers: what they are given, and what becomes of a run when they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longnet.training import TrainSettings, track, train
from longnet.training.metrics import read_metrics

Make = Callable[..., TrainSettings]

SENT = {
    "train": ("loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_second"),
    "eval": ("loss", "bits_per_byte"),
}


class Stop(Exception):
    """Raised by a callback, as a kill would come: after steps that no checkpoint has."""


def stop_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    def callback(line: Mapping[str, Any]) -> None:
        if line["step"] == step:
            raise Stop

    return callback


def lines_of(settings: TrainSettings) -> list[dict[str, Any]]:
    return read_metrics(Path(settings.out) / "metrics.jsonl")


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_callbacks_are_given_each_line(make_settings: Make) -> None:
    class Counter:
        count = 0

        def __call__(self, line: Mapping[str, Any]) -> None:
            self.count += 1

    given: list[dict[str, Any]] = []
    counter, settings = Counter(), make_settings()
    train(settings, callbacks=[lambda line: given.append(dict(line)), counter])
    assert given == lines_of(settings) and counter.count == len(given) == 12 + 3


def test_each_callback_has_its_own_line(make_settings: Make) -> None:
    lines: list[dict[str, Any]] = []
    train(make_settings(steps=1, eval_every=0), callbacks=[lambda line: line.clear(), lines.append])
    assert [line["step"] for line in lines] == [1]


@pytest.mark.parametrize("callbacks", [[5], print, None])
def test_callbacks_that_cannot_be_called_are_refused_first(make_settings: Make, callbacks: Any) -> None:
    settings = make_settings()
    with pytest.raises(TypeError, match="callbacks"):
        train(settings, callbacks=callbacks)
    assert not Path(settings.out).exists()


def test_an_error_of_a_callback_ends_a_run_that_can_go_on(make_settings: Make, tmp_path: Path) -> None:
    settings, whole = make_settings(), make_settings(out=str(tmp_path / "whole"))
    with pytest.raises(Stop):
        train(settings, callbacks=[stop_at(8)])
    assert lines_of(settings)[-1]["step"] == 8
    given: list[int] = []
    train(settings, resume=True, callbacks=[lambda line: given.append(line["step"])])
    assert given[0] == 6, "the last checkpoint is of step 5"
    train(whole)
    assert without_clock(lines_of(settings)) == without_clock(lines_of(whole))


def test_tensorboard_shows_the_lines_of_the_metrics_once(make_settings: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = make_settings(track="tensorboard", lr=0.0625)
    with pytest.raises(Stop):
        train(settings, callbacks=[stop_at(8)])
    train(settings, resume=True)
    shown = EventAccumulator(str(Path(settings.out) / "tensorboard")).Reload()
    names = [f"{kind}/{name}" for kind, sent in SENT.items() for name in sent]
    assert sorted(shown.Tags()["scalars"]) == sorted(names)
    for kind, sent in SENT.items():
        lines = [line for line in lines_of(settings) if line["kind"] == kind]
        for name in sent:
            found = {event.step: event.value for event in shown.Scalars(f"{kind}/{name}")}
            assert found == {line["step"]: pytest.approx(line[name]) for line in lines}, name
    config = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.segment_lengths" in config and b"lr" in config


@pytest.fixture(params=["wandb", "trackio"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the library, which takes down what it is asked for; ``fail`` names what raises an error."""
    library = SimpleNamespace(name=request.param, inits=[], logs=[], finished=0, fail="")

    def called(name: str, note: Callable[[], Any]) -> None:
        note()
        if library.fail == name:
            raise ConnectionError(f"no {name} today")

    def finish() -> None:
        library.finished += 1

    run = SimpleNamespace(
        log=lambda values, step: called("log", lambda: library.logs.append((step, values))),
        finish=lambda: called("finish", finish),
    )

    def init(**options: Any) -> SimpleNamespace:
        called("init", lambda: library.inits.append(options))
        return run

    library.init, library.__spec__ = init, ModuleSpec(request.param, None, origin="a file")
    monkeypatch.setitem(sys.modules, request.param, library)
    monkeypatch.delenv(f"{request.param.upper()}_PROJECT", raising=False)
    return library


def test_wandb_and_trackio_go_on_with_their_run(
    fake: Any, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(track=fake.name)
    train(settings, should_stop=iter([False] * 8 + [True]).__next__)
    monkeypatch.setenv(f"{fake.name.upper()}_PROJECT", "mine")
    train(settings, resume=True)
    first, second = fake.inits
    assert (first.pop("project"), second.pop("project")) == ("longnet", "mine")
    assert first == second and first["resume"] == "allow" and first["config"] == settings.to_dict()
    assert first["name"].startswith("run-") and len(first["name"]) > len("run-")
    if fake.name == "wandb":
        assert first["name"] == f"run-{first['id']}" and first["dir"] == settings.out
    assert fake.logs == [
        (line["step"], {f"{line['kind']}/{name}": line[name] for name in SENT[line["kind"]]})
        for line in lines_of(settings)
    ]
    assert fake.finished == 2
    # Another run is another one there, too.
    train(settings.replace(out=f"{settings.out} b", steps=1))
    assert fake.inits[2]["name"] != first["name"]


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(fake: Any, make_settings: Make) -> None:
    settings, fake.fail = make_settings(track=fake.name), "log"
    with pytest.warns(RuntimeWarning, match=rf"track='{fake.name}' failed at step 1 \(ConnectionError: no log") as said:
        assert train(settings).finished
    assert len(said) == len(fake.logs) == fake.finished == 1
    assert lines_of(settings)[-1]["step"] == 12
    fake.fail = "finish"
    with pytest.warns(RuntimeWarning, match="failed when it was closed"):
        assert train(settings, resume=True).finished


def test_a_tracker_that_cannot_start_is_refused(fake: Any, make_settings: Make) -> None:
    settings, fake.fail = make_settings(track=fake.name), "init"
    message = rf"track='{fake.name}' cannot start \(ConnectionError: no init today\): expected a {fake.name} that works"
    with pytest.raises(ValueError, match=message):
        train(settings)
    assert not Path(settings.out).exists()
    train(settings.replace(track="none"))
    with pytest.raises(ValueError, match=message):
        train(settings, resume=True)
    assert train(settings.replace(track="none"), resume=True).step == 12


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
@pytest.mark.parametrize("found", [None, ModuleSpec("a folder", None)])
def test_a_tracker_that_is_not_installed_is_refused(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, name: str, found: ModuleSpec | None
) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: found)
    settings = make_settings(track=name)
    with pytest.raises(ValueError, match=f"track='{name}' needs {name}, .*: expected `pip install {name}` first"):
        train(settings)
    assert not Path(settings.out).exists()


def test_a_refused_run_leaves_no_folder_of_a_tracker_and_takes_none_away(make_settings: Make) -> None:
    settings = make_settings(track="tensorboard")
    with pytest.raises(ValueError, match="backend='nope' is unknown"):
        train(settings.replace(model=settings.model.replace(backend="nope")))
    assert not Path(settings.out).exists()
    (Path(settings.out) / "tensorboard").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds \['tensorboard'\], which a run would overwrite"):
        train(settings)
    assert (Path(settings.out) / "tensorboard").is_dir()
