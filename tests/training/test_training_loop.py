"""The loop: what it writes, that it learns, that stopping and resuming changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet.models import LongNetConfig, LongNetLM
from longnet.training import (
    CheckpointError,
    TrainingDiverged,
    TrainSettings,
    load_model,
    loop,
    read_corpus,
    train,
    write_report,
)
from longnet.training.folder import RunFolder
from longnet.training.metrics import RUN_LINES, read_metrics
from longnet.training.progress import SilentReporter
from longnet.training.resume import read_settings
from longnet.training.settings import OPTIMIZERS
from longnet.training.trainer import Trainer

Make = Callable[..., TrainSettings]


def _metrics(settings: TrainSettings, kind: str) -> list[tuple[Any, ...]]:
    """What must not depend on when a run was stopped: everything but the clock."""
    lines = read_metrics(Path(settings.out) / "metrics.jsonl")
    clock = {"seconds", "tokens_per_second"}
    return [tuple(v for k, v in line.items() if k not in clock) for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """The settings of a run of two steps that has ended."""
    root = tmp_path_factory.mktemp("finished")
    (root / "text.txt").write_text("some text to learn by heart. " * 200)
    settings = TrainSettings(
        out=str(root / "run"), data=str(root / "text.txt"), model=LongNetConfig.preset("nano", layers=1), context=32,
        steps=2, batch=2, eval_every=1, eval_windows=2, device="cpu", threads=1,
    )  # fmt: skip
    train(settings)
    return settings


def _stop_after(count: int) -> Callable[[], bool]:
    asked = iter(range(count + 1))
    return lambda: next(asked) == count


def _state(settings: TrainSettings) -> Path:
    return Path(settings.out) / "checkpoint" / "state.safetensors"


@pytest.mark.parametrize(("threads", "context", "expected"), [(None, 32, 1), (None, 4200, 2), (2, 32, 2)])
def test_a_small_model_trains_on_one_thread(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, threads: int | None, context: int, expected: int
) -> None:
    found: list[int] = []
    monkeypatch.setattr(Trainer, "start", lambda self, checkpoint: found.append(torch.get_num_threads()))
    monkeypatch.setattr(Trainer, "run", lambda self, should_stop: None)
    monkeypatch.setattr("longnet.training.loop.check_lengths", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(make_settings(threads=threads, context=context))
        assert found == [expected] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_learns_and_writes_what_it_promises(make_settings: Make, optimizer: str) -> None:
    settings = make_settings(steps=60, lr=0.02, eval_every=20, optimizer=optimizer)
    summary = train(settings)
    assert (summary.step, summary.tokens, summary.finished) == (60, 60 * 64, True)
    folder = Path(settings.out)
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert steps[-1]["tokens"] == 60 * 64
    assert sum(line["loss"] for line in steps[-5:]) < 0.75 * sum(line["loss"] for line in steps[:5])
    evaluations = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [20, 40, 60]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"]
    record = json.loads((folder / "run.json").read_text())
    assert TrainSettings.from_dict(record["settings"]) == settings
    assert record["versions"]["torch"] == torch.__version__
    assert json.loads((folder / "config.json").read_text()) == settings.model.to_dict()


def test_the_trained_model_is_what_load_model_gives(make_settings: Make) -> None:
    settings = make_settings()
    train(settings)
    before = torch.get_rng_state()
    model = load_model(settings.out)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training and model.config == settings.model
    state = load_file(_state(settings))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stops", [(1,), (5,), (3, 4), (12,)])
def test_a_stopped_and_resumed_run_has_the_losses_of_one_that_was_not(
    make_settings: Make, tmp_path: Path, stops: tuple[int, ...], optimizer: str
) -> None:
    whole, parts = (
        make_settings(out=str(tmp_path / name), accumulate=2, optimizer=optimizer) for name in ("whole", "parts")
    )
    train(whole)
    for number, stop in enumerate(stops):
        summary = train(parts, resume=number > 0, should_stop=_stop_after(stop))
        assert summary.finished == (sum(stops[: number + 1]) >= 12)
    train(parts, resume=True)
    assert _metrics(parts, "train") == _metrics(whole, "train")
    assert _metrics(parts, "eval") == _metrics(whole, "eval")
    assert _state(parts).stat().st_size > 0
    one, other = load_model(whole.out).state_dict(), load_model(parts.out).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_while_saving_loses_nothing(make_settings: Make, tmp_path: Path) -> None:
    whole = make_settings(out=str(tmp_path / "whole"))
    train(whole)
    parts = make_settings(out=str(tmp_path / "parts"))
    train(parts, should_stop=_stop_after(7))
    state = _state(parts)
    state.with_name(f".{state.name}.partial").write_bytes(state.read_bytes()[:1000])
    with (Path(parts.out) / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 8, "loss": 0.0}\n{"kind": "trai')
    train(parts, resume=True)
    assert _metrics(parts, "train") == _metrics(whole, "train")
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_a_kill_before_the_first_checkpoint_starts_from_the_seed(make_settings: Make, tmp_path: Path) -> None:
    whole = make_settings(out=str(tmp_path / "whole"))
    train(whole)
    parts = make_settings(out=str(tmp_path / "parts"))
    train(parts, should_stop=_stop_after(0))
    _state(parts).unlink()
    train(parts, resume=True)
    assert _metrics(parts, "train") == _metrics(whole, "train")


def test_a_truncated_checkpoint_is_refused_and_nothing_is_changed(make_settings: Make) -> None:
    settings = make_settings()
    train(settings, should_stop=_stop_after(6))
    state = _state(settings)
    state.write_bytes(state.read_bytes()[:-10])
    before = {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"state\.safetensors is truncated"):
        train(settings, resume=True)
    assert {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()} == before


def test_the_checkpoint_of_another_run_is_refused(make_settings: Make, tmp_path: Path) -> None:
    one, other = make_settings(out=str(tmp_path / "one")), make_settings(out=str(tmp_path / "other"), seed=9)
    for settings in (one, other):
        train(settings, should_stop=_stop_after(2))
    shutil.copy(_state(other), _state(one))
    with pytest.raises(CheckpointError, match="belongs to another run .* seed was 0, now 9"):
        train(one, resume=True)


def test_resuming_with_other_settings_names_each(make_settings: Make, text_folder: Path) -> None:
    settings = make_settings()
    train(settings, should_stop=_stop_after(2))
    with pytest.raises(ValueError, match=r"batch was 2, now 1; lr was 0\.001, now 0\.1"):
        train(settings.replace(batch=1, lr=0.1), resume=True)
    with pytest.raises(ValueError, match=r"data was '.*text', now '.*a'"):
        train(settings.replace(data=str(text_folder / "a")), resume=True)


def test_a_run_reads_its_data_once(make_settings: Make, text_folder: Path, tmp_path: Path) -> None:
    whole = make_settings(out=str(tmp_path / "whole"))
    train(whole)
    settings = make_settings()
    train(settings, should_stop=_stop_after(5))
    shutil.rmtree(text_folder)
    train(settings, resume=True)
    assert _metrics(settings, "train") == _metrics(whole, "train")
    write_report(settings.out)
    tokens = Path(settings.out) / "data" / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"train\.tokens is damaged: its content"):
        train(settings, resume=True)


def test_a_run_can_be_made_longer_only_where_no_rate_would_have_changed(make_settings: Make, tmp_path: Path) -> None:
    cosine = make_settings(out=str(tmp_path / "cosine"))
    train(cosine, should_stop=_stop_after(6))
    with pytest.raises(ValueError, match=r"another length \(steps was 12, now 24\): its schedule='cosine'"):
        train(cosine.replace(steps=24), resume=True)
    constant = make_settings(out=str(tmp_path / "constant"), schedule="constant")
    train(constant)
    assert train(constant.replace(steps=15), resume=True).step == 15
    whole = make_settings(out=str(tmp_path / "whole"), schedule="constant", steps=15)
    train(whole)
    assert _metrics(constant, "train") == _metrics(whole, "train")
    with pytest.raises(ValueError, match="steps=14: the run has done 15 already"):
        train(constant.replace(steps=14), resume=True)


def test_short_windows_come_first_and_a_step_has_as_many_tokens(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    loss = LongNetLM.loss

    def note(self: LongNetLM, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if self.training:
            shapes.append(tuple(tokens.shape))
        return loss(self, tokens, *args, **options)

    monkeypatch.setattr(LongNetLM, "loss", note)
    options = {"short_context": 8, "short_share": 0.5, "accumulate": 2}
    whole = make_settings(out=str(tmp_path / "whole"), **options)
    train(whole)
    assert shapes == [(8, 8)] * 2 * 6 + [(2, 32)] * 2 * 6
    # Stopped in the middle of either part, its windows are the same.
    parts = make_settings(out=str(tmp_path / "parts"), **options)
    train(parts, should_stop=_stop_after(4))
    train(parts, resume=True, should_stop=_stop_after(4))
    train(parts, resume=True)
    assert _metrics(parts, "train") == _metrics(whole, "train")
    packed = make_settings(out=str(tmp_path / "packed"), pack="documents", short_context=16)
    assert train(packed).tokens == 12 * 64
    with pytest.raises(ValueError, match="short_context=12 with context=32: expected a divisor of the context"):
        make_settings(short_context=12)


def test_a_run_with_short_windows_can_be_made_longer_before_their_end(make_settings: Make, tmp_path: Path) -> None:
    options = {"schedule": "constant", "short_context": 8, "short_share": 0.5}
    for done, is_refused in ((6, False), (7, True)):
        settings = make_settings(out=str(tmp_path / str(done)), **options)
        train(settings, should_stop=_stop_after(done))
        if is_refused:
            with pytest.raises(ValueError, match=r"short_share=0.5 would have given other windows to the 7 steps"):
                train(settings.replace(steps=24), resume=True)
        else:
            assert train(settings.replace(steps=24), resume=True).step == 24
            longer = make_settings(out=str(tmp_path / "longer"), **{**options, "steps": 24})
            train(longer)
            assert _metrics(settings, "train") == _metrics(longer, "train")


def test_a_run_that_has_lost_its_checkpoint_is_refused_and_nothing_is_changed(make_settings: Make) -> None:
    settings = make_settings()
    train(settings, should_stop=_stop_after(7))
    state = Path(settings.out) / "checkpoint" / "state.safetensors"
    content = state.read_bytes()
    state.unlink()
    before = {path: path.read_bytes() for path in Path(settings.out).rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=r"neither state\.safetensors nor latest\.json.* has steps up to 7: expected"
    ):
        train(settings, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    state.write_bytes(content)
    assert train(settings, resume=True).step == 12


def test_resuming_a_finished_run_does_nothing(make_settings: Make) -> None:
    settings = make_settings()
    train(settings)
    before = (Path(settings.out) / "metrics.jsonl").read_bytes()
    summary = train(settings, resume=True)
    assert summary.step == 12 and summary.finished
    assert (Path(settings.out) / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use_and_a_missing_run_are_refused(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    with pytest.raises(ValueError, match="is not a folder: expected the --out folder"):
        train(settings, resume=True)
    train(settings)
    with pytest.raises(ValueError, match="already holds a run: expected another folder, or --resume"):
        train(settings)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds \['config.json'\], which a run would overwrite"):
        train(make_settings(out=str(foreign)))
    with pytest.raises(ValueError, match="is a file"):
        train(make_settings(out=str(foreign / "config.json")))


def test_a_run_stopped_while_its_data_were_prepared_begins_with_the_same_settings_alone(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(steps=2)
    with monkeypatch.context() as patched:
        patched.setattr("longnet.training.loop.read_corpus", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    with pytest.raises(ValueError, match="cannot be resumed with other settings: batch was 2, now 4"):
        train(settings.replace(batch=4), resume=True)
    with pytest.raises(ValueError, match="holds a run that has not begun, .*--resume first"):
        write_report(settings.out)
    assert read_settings(RunFolder(settings.out)) == settings
    assert train(settings, resume=True).step == 2


def _interrupted(*arguments: Any, **more: Any) -> None:
    raise KeyboardInterrupt


def test_data_without_settings_are_said(make_settings: Make) -> None:
    settings = make_settings()
    read_corpus(settings.data, folder=Path(settings.out) / "data")
    with pytest.raises(ValueError, match="only its data: expected the same command without --resume first"):
        train(settings, resume=True)


@pytest.mark.parametrize("content", [None, b""])
def test_a_run_that_has_lost_its_metrics_is_refused(make_settings: Make, content: bytes | None) -> None:
    settings = make_settings(steps=2)
    train(settings)
    file = Path(settings.out) / "metrics.jsonl"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl is (missing|empty): expected the lines of the steps"):
        train(settings, resume=True)


def test_cp_needs_as_many_processes(make_settings: Make) -> None:
    settings = make_settings(cp=2)
    with pytest.raises(ValueError, match=r"cp=2 with 1 process\(es\): expected 1"):
        train(settings)
    assert not Path(settings.out).exists()


def test_a_foreign_vocabulary_says_what_to_write(make_settings: Make) -> None:
    settings = make_settings()
    with pytest.raises(ValueError, match=r"vocab_size=300 in the model: expected LongNetConfig\(..., vocab_size=256\)"):
        train(settings.replace(model=settings.model.replace(vocab_size=300)))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [("adamw", r"lr \(now 1e\+30\)"), ("muon", r"lr \(now 1e\+30\) and matrix_lr \(now 3e\+30\)")],
)
def test_a_loss_that_is_not_finite_stops_before_the_last_good_checkpoint_is_lost(
    make_settings: Make, clip: float, optimizer: str, rates: str
) -> None:
    settings = make_settings(lr=1e30, save_every=1, warmup=0, clip=clip, optimizer=optimizer)
    with pytest.raises(TrainingDiverged, match=f"still holds step .* A lower {rates}, a longer"):
        train(settings)
    assert all(tensor.isfinite().all() for tensor in load_model(settings.out).state_dict().values())


def test_minutes_end_a_run_and_its_schedule(make_settings: Make) -> None:
    settings = make_settings(steps=None, minutes=1.0 / 60, eval_every=0, save_every=0)
    summary = train(settings)
    assert summary.finished and 1.0 <= summary.seconds < 5.0
    lines = read_metrics(Path(settings.out) / "metrics.jsonl")
    assert len(lines) == summary.step
    assert lines[-1]["lr"] < 0.15 * max(line["lr"] for line in lines)


def test_the_callers_generator_and_threads_are_left_alone(make_settings: Make) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(make_settings(steps=2, threads=threads + 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_bfloat16_trains_on_float32_weights(make_settings: Make) -> None:
    settings = make_settings(dtype="bfloat16")
    train(settings)
    assert {tensor.dtype for tensor in load_model(settings.out).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_weights_are_trained_saved_and_resumed(make_settings: Make, tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "steps": 40, "lr": 0.01, "optimizer": optimizer}
    whole, parts = (
        make_settings(out=str(tmp_path / name), weights="bfloat16", **options) for name in ("whole", "parts")
    )
    train(whole)
    train(parts, should_stop=_stop_after(15))
    train(parts, resume=True)
    assert _metrics(parts, "train") == _metrics(whole, "train")
    state = load_file(_state(whole))
    kinds = {tensor.dtype for name, tensor in state.items() if not name.endswith(".step") and name[:3] != "rng"}
    assert kinds == {torch.bfloat16} == {tensor.dtype for tensor in load_model(whole.out).state_dict().values()}
    with pytest.raises(ValueError, match="weights was 'bfloat16', now 'float32'"):
        train(whole.replace(weights="float32"), resume=True)
    # Near the losses of float32 weights, and not these.
    exact = make_settings(out=str(tmp_path / "exact"), **options)
    train(exact)
    rounded, unrounded = (
        [line["loss"] for line in read_metrics(Path(one.out) / "metrics.jsonl")] for one in (whole, exact)
    )
    assert rounded == pytest.approx(unrounded, rel=0.05) and rounded != unrounded


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_is_the_mean_of_its_parts(make_settings: Make, tmp_path: Path, optimizer: str) -> None:
    options = {"model": make_settings().model.replace(dropout=0.0), "optimizer": optimizer}
    one = make_settings(out=str(tmp_path / "one"), batch=4, accumulate=1, **options)
    two = make_settings(out=str(tmp_path / "two"), batch=1, accumulate=4, **options)
    for settings in (one, two):
        train(settings)
    losses = [[line["loss"] for line in read_metrics(Path(s.out) / "metrics.jsonl")] for s in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_held_out_part_shorter_than_the_context_is_said(make_settings: Make, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abcdefgh" * 25)
    lines: list[str] = []

    class Heard:
        say = staticmethod(lines.append)

        def begin(self, title: str, done: float = 0.0) -> None: ...

        def advance(self, done: float, detail: str = "") -> None: ...

        def end(self) -> None: ...

    train(make_settings(data=str(file)), reporter=Heard())
    assert any("shorter than one context: evaluating on 19 bytes" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 200_000}, "context=200000 needs 200001 tokens in a row"),
        ({"model": "nope"}, "backend='nope' is unknown"),
    ],
)
def test_a_refused_run_leaves_nothing_and_the_corrected_one_starts(
    make_settings: Make, changes: dict[str, Any], message: str
) -> None:
    good = make_settings(steps=1, eval_every=0)
    if "model" in changes:
        changes = {"model": good.model.replace(backend=changes["model"])}
    with pytest.raises(ValueError, match=message):
        train(good.replace(**changes))
    assert not Path(good.out).exists()
    assert train(good).step == 1


def test_a_run_folder_in_its_own_data_is_refused(make_settings: Make, text_folder: Path) -> None:
    before = read_corpus(text_folder).fingerprint
    for out in (text_folder, text_folder / "a" / "run"):
        with pytest.raises(ValueError, match=r"out=.* lies in data=.*: expected a folder outside of it"):
            train(make_settings(out=str(out)))
    assert not (text_folder / "a" / "run").exists()
    settings = make_settings(out=str(text_folder / ".run"), steps=1, eval_every=0)
    train(settings)
    assert read_corpus(text_folder).fingerprint == before


def test_a_run_folder_that_a_link_in_the_data_leads_to_is_refused(
    make_settings: Make, text_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "project" / "deep").mkdir(parents=True)
    (text_folder / "link").symlink_to("../project")
    for out in (tmp_path / "project", tmp_path / "project" / "deep" / "run"):
        with pytest.raises(ValueError, match=r"out=.* lies in data=.* \(as '.*link.*'\), so its files would be read"):
            train(make_settings(out=str(out), steps=1, eval_every=0))
    assert [path.name for path in (tmp_path / "project").rglob("*")] == ["deep"]


@pytest.mark.parametrize("after", range(9))
def test_a_kill_at_any_first_write_leaves_a_run_that_is_new_or_can_go_on(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The first writes are the settings, the data, run.json, config.json, the metrics, the checkpoint and the model."""

    class Killed(BaseException):
        pass

    count = iter(range(100))

    def replace(source: Path, target: Path) -> None:
        if next(count) == after:
            raise Killed
        original(source, target)

    original = os.replace
    settings = make_settings(steps=2, eval_every=0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(settings)
    assert train(settings, resume=after > 0).step == 2
    assert not (Path(settings.out) / "starting.json").exists()
    assert load_model(settings.out).config == settings.model


@pytest.mark.parametrize("steps", [12, 40])
def test_a_kill_between_checkpoint_and_model_is_repaired_by_resuming(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "model.safetensors" and next(writes) == 1:
            raise Killed
        original(source, target)

    original, writes = os.replace, iter(range(100))
    settings = make_settings(save_every=12, eval_every=0, steps=steps)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(settings)
    # Stops at once: the model is repaired without a further step.
    assert train(settings, resume=True, should_stop=lambda: True).step == 12
    _check_model_is_the_checkpoints(settings)


def _check_model_is_the_checkpoints(settings: TrainSettings) -> None:
    weights, state = load_model(settings.out).state_dict(), load_file(_state(settings))
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "foreign", "of another run", "of another config"]
)
def test_resuming_a_finished_run_repairs_its_model(make_settings: Make, tmp_path: Path, damage: str) -> None:
    settings = make_settings(steps=2, eval_every=0)
    train(settings)
    file = Path(settings.out) / "model.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "foreign":
        save_file(load_file(file), file)
    elif damage == "of another run":
        train(settings.replace(out=str(tmp_path / "other"), seed=3))
        shutil.copy(tmp_path / "other" / "model.safetensors", file)
    elif damage == "of another config":
        RunFolder(settings.out).write_weights(load_file(file), settings.model.replace(dropout=0.3))
    else:
        file.write_bytes(content[:-8] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    reporter = SilentReporter()
    reporter.say = said.append  # type: ignore[method-assign]
    assert train(settings, resume=True, reporter=reporter).step == 2
    assert file.read_bytes() == content
    assert any("model.safetensors is missing, damaged or of another step: writing it" in line for line in said)
    said.clear()
    before = file.stat().st_mtime_ns
    train(settings, resume=True, reporter=reporter)
    assert file.stat().st_mtime_ns == before and not any("writing it" in line for line in said)


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("train", '"kind"', '"kinc"', r"has no 'kind', expected one of \['train', 'eval'\]"),
        ("train", '"train"', '"trail"', r"has kind='trail', expected one of \['train', 'eval'\]"),
        *(
            (kind, f'"{name}"', f'"{name[:-1]}_"', rf"\({kind}\) has no '{name}'")
            for kind, names in RUN_LINES.items()
            for name in names
            if name != "step"
        ),
        ("train", '"tokens": 64,', '"tokens": "64",', r"\(train\) has tokens='64'"),
        ("eval", '"windows": 2', '"windows": true', r"\(eval\) has windows=True"),
        ("eval", '"loss": [^,]*', '"loss": 1e999', r"\(eval\) has loss=inf"),
        ("train", '"lr": ', '"lr": -Infinity, "x": ', r"\(train\) has lr=-inf"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(
    finished: TrainSettings, kind: str, old: str, new: str, message: str
) -> None:
    file = Path(finished.out) / "metrics.jsonl"
    content = file.read_text()
    lines = content.splitlines()
    number = next(n for n, line in enumerate(lines) if f'"kind": "{kind}"' in line)
    lines[number], count = re.subn(old, new, lines[number])
    assert count == 1
    file.write_text("".join(f"{line}\n" for line in lines))
    message = rf"metrics\.jsonl is damaged: line {number + 1}.*{message}"
    try:
        with pytest.raises(ValueError, match=message):
            train(finished, resume=True)
        with pytest.raises(ValueError, match=message):
            write_report(finished.out)
    finally:
        file.write_text(content)


def test_names_that_are_no_utf8(make_settings: Make, tmp_path: Path) -> None:
    """Bytes of a path that are no UTF-8 go through the run, its report and its model."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (tmp_path / "text").rename(folder)
    settings = make_settings(data=str(folder), out=f"{folder}-run", steps=1, eval_every=0)
    train(settings)
    write_report(settings.out)
    assert r"caf\udce9" in Path(settings.out, "report.html").read_text(encoding="utf-8")
    assert train(settings, resume=True).step == 1
    assert load_model(settings.out).config == settings.model


class _Saying(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_compiled_blocks_learn_the_same(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each type of layer, in training and in evaluation; the same losses, resumed or not."""
    made: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    types = ("sliding_attention", "strided_attention", "full_attention", "shifted_dilated_attention")
    model = LongNetConfig.preset("nano", layers=8, layer_types=types, sliding_window=9)
    options = {"model": model, "steps": 4, "eval_every": 2, "save_every": 1}
    plain = make_settings(**options)
    compiled = plain.replace(out=f"{plain.out} compiled", compile=True)
    train(plain)
    assert not made
    torch._dynamo.reset()
    reporter = _Saying()
    assert not train(compiled, should_stop=_stop_after(2), reporter=reporter).finished
    assert any(line.startswith("Compiling the blocks") for line in reporter.said)
    assert train(compiled, resume=True).finished
    # Not one for each of the eight blocks.
    assert len(types) <= len(made) <= 4 * len(types)
    for kind in ("train", "eval"):
        for ours, theirs in zip(_metrics(compiled, kind), _metrics(plain, kind), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4))
    # Nothing of it is in what is saved.
    assert load_file(_state(compiled)).keys() == load_file(_state(plain)).keys()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_dropout_draws_what_it_draws_uncompiled(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options) or function)
    model = LongNetConfig.preset("nano", layers=1, dropout=dropout)
    train(make_settings(model=model, compile=True, steps=1))
    # torch's compiler draws numbers of its own otherwise.
    assert given == [{"fullgraph": True} | ({"options": {"fallback_random": True}} if dropout else {})]


@pytest.mark.parametrize(
    ("has_triton", "capability", "expected"), [(True, (8, 0), True), (False, (8, 0), False), (True, (6, 1), False)]
)
def test_a_gpu_compiles_by_default_where_it_can(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, has_triton: bool, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(loop, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reporter, gpu = _Saying(), torch.device("cuda")
    assert loop._compiled(make_settings(), gpu, reporter) is expected
    # What is not done is told.
    assert [line.startswith("Not compiling the blocks") for line in reporter.said] == [True] * (not expected)
    assert not loop._compiled(make_settings(compile=False), gpu, reporter)
    assert not loop._compiled(make_settings(), torch.device("cpu"), reporter)


def test_a_step_reads_no_number_before_the_optimizer_is_done(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each number that is read is a wait."""
    order: list[str] = []
    for name in ("item", "tolist"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, read=read: order.append("read") or read(x))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *x, **more: (order.append("step"), step(*x, **more))[1])
    train(
        make_settings(steps=2, batch=2, accumulate=2, eval_every=0, save_every=0, optimizer="adamw"),
        callbacks=[lambda line: order.append("end")],
    )
    steps = " ".join(order).split("end")
    assert [one.split()[-2:] for one in steps[:2]] == [["step", "read"]] * 2
    assert "read" not in steps[1].split()[:-1]
