"""Stacks that learn for the same time: results are whole, other lengths are read, a run goes on, another is converted."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import profile_training
from benchmarks.learning import equal_time, generation, keep
from longnet import LongNetConfig, LongNetLM
from longnet.training import TrainSettings, train

SIZES = ("--layers", "4", "--dim", "16", "--heads", "2", "--context", "1024", "--batch", "2", "--held-out", "2")
BEGUN = {"steps": 10, "seconds_a_step": {"longnet": 0.1}, "dense_by": "longnet"}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The program on random text; what it made, by name."""
    generator = np.random.default_rng(0)
    for number in range(40):
        lines = [" ".join(map(str, row)) for row in generator.integers(0, 1000, (40, 8))]
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(lines))

    def run(*more: str) -> dict[str, dict]:
        out = tmp_path / "out"
        given = ("equal_time", "--out", str(out), "--data", str(tmp_path / "text"), *SIZES, *more)
        monkeypatch.setattr(sys, "argv", list(given))
        equal_time.main()
        return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}

    run.out = tmp_path / "out"
    return run


def test_a_stack_learns_and_is_read_at_another_length(command, monkeypatch, capsys):
    made = command("--minutes", "0.02", "--stacks", "balanced;longnet", "--read", "1536")
    assert made.keys() == {"balanced-0", "longnet-0"}
    one = made["balanced-0"]
    assert one["at"].keys() == {"1024", "1536"} and len(one["at"]["1024"]["by_window"]) == 2
    assert one["steps"] == max(1, int(1.2 / one["seconds_a_step"]["longnet"])) and one["tokens"] == one["steps"] * 2048
    assert one["model"]["layer_types"].count("full_attention") == 1
    # Three windows of 512 and one dense layer.
    window = sum(min(n + 1, 512) for n in range(1024)) / (1024 * 1025 / 2)
    assert one["cost"] == pytest.approx((3 * window + 1) / 4)
    monkeypatch.setattr(equal_time, "run", None)
    capsys.readouterr()
    command("--minutes", "0.02", "--stacks", "balanced;longnet", "--read", "1536")
    assert capsys.readouterr().out.count("is there") == 2
    with pytest.raises(SystemExit):
        command("--minutes", "0.03", "--stacks", "balanced")
    assert (
        "minutes was 0.02, now 0.03, reads was [1536], now []. Expected the same, or another --out"
        in capsys.readouterr().err
    )


def test_seeds_of_a_stack_have_as_many_steps(command, monkeypatch):
    timed = []

    def seconds(plan, corpus, dense_by):
        timed.append((plan.stack, plan.seed, plan.minutes))
        return 20.0 + 5 * len(timed)

    monkeypatch.setattr(equal_time, "seconds_a_step", seconds)
    command("--minutes", "1", "--stacks", "window")
    made = command("--minutes", "1", "--stacks", "window;longnet", "--seeds", "0,1")
    assert {name: one["steps"] for name, one in made.items()} == {
        "window-0": 2, "window-1": 2, "longnet-0": 2, "longnet-1": 2,
    }  # fmt: skip
    assert timed == [("window", 0, 1.0), ("longnet", 0, 1.0)]
    assert made["window-1"]["seconds_a_step"] == {"longnet": 25.0}
    assert made["window-0"]["at"] != made["window-1"]["at"]
    # Another time is another run.
    assert command("--minutes", "2", "--stacks", "window", "--seeds", "2")["window-2"]["steps"] == 3
    assert timed[2:] == [("window", 2, 2.0)]


def test_a_run_goes_on_where_it_was_stopped(command, monkeypatch):
    monkeypatch.setattr(equal_time, "begin", lambda *given: BEGUN)
    whole = command("--stacks", "window", "--minutes", "1")["window-0"]
    command.out.rename(command.out.with_name("whole"))

    class Killed(Exception):
        pass

    def kill(settings: TrainSettings, **more):
        def callback(line):
            if line["step"] == 5:
                raise Killed

        return train(settings, **{**more, "callbacks": [callback]})

    monkeypatch.setattr(equal_time, "train", kill)
    with pytest.raises(Killed):
        command("--stacks", "window", "--minutes", "1")
    monkeypatch.setattr(equal_time, "train", train)
    again = command("--stacks", "window", "--minutes", "1")["window-0"]
    assert again["at"] == whole["at"] and again["tokens"] == whole["tokens"] == 10 * 2048


def test_a_dense_run_is_converted(command, monkeypatch):
    monkeypatch.setattr(equal_time, "seconds_a_step", lambda plan, corpus, dense_by: 3.0)
    command("--minutes", "1", "--stacks", "dense")
    run = command.out / "runs" / "dense-0"
    made = command("--convert", str(run), "--shares", "0,0.1,0.2", "--stacks", "light", "--plain", "--rate", "0.5")
    made.pop("dense-0")
    assert sorted(one["steps"] for one in made.values()) == [0, 2, 4]
    first, last = (made[f"light_plain-from-dense-0-{share}-at-0.5-0"] for share in (0.0, 0.2))
    assert first["converted"] == "dense-0" and first["minutes"] is None and first["curve"] == []
    assert not last["model"]["shift_keys"] and last["model"]["far_positions"]
    # As it is it is already nearer to the dense model than to where that began.
    assert first["at"]["1024"]["bits"] < 7.9


def test_a_dense_run_keeps_the_layers_that_read_far(command, monkeypatch, capsys):
    monkeypatch.setattr(equal_time, "seconds_a_step", lambda plan, corpus, dense_by: 20.0)
    command("--minutes", "1", "--stacks", "dense")
    run = command.out / "runs" / "dense-0"
    given = ("--convert", str(run), "--shares", "0", "--keep", "1", "3")
    made = command(*given)
    one, three = (
        made[f"window_dense_{count}_4_kept-from-dense-0-0.0-at-0.3-0"]["model"]["layer_types"] for count in (1, 3)
    )
    assert one.count("full_attention") == 1 and three.count("full_attention") == 3
    order = json.loads((command.out / "runs" / "dense-0.order.json").read_text())["order"]
    assert [at for at, name in enumerate(three) if name == "full_attention"] == order[0]["full"]
    assert [at for at, name in enumerate(one) if name == "full_attention"] == order[2]["full"]
    monkeypatch.setattr(keep, "window_layers", None)
    command(*given)
    for words, given in (
        ("--keep 4: expected from 1 to 3", ("--convert", str(run), "--keep", "4")),
        ("expected neither --stacks nor --plain", ("--convert", str(run), "--keep", "1", "--stacks", "light")),
        ("--shares, --rate and --keep are of a converted run", ("--keep", "1")),
    ):
        with pytest.raises(SystemExit):
            command(*given)
        assert words in capsys.readouterr().err


def test_a_model_of_the_same_layers_is_converted_to_itself(command, monkeypatch, capsys):
    monkeypatch.setattr(equal_time, "seconds_a_step", lambda plan, corpus, dense_by: 20.0)
    dense = command("--minutes", "1", "--stacks", "dense")["dense-0"]
    run = command.out / "runs" / "dense-0"
    same = command("--convert", str(run), "--shares", "0", "--stacks", "dense")["dense-from-dense-0-0.0-at-0.3-0"]
    assert same["at"] == dense["at"]
    for given, words in (
        (("--convert", str(run), "--shares", "2"), "2: expected numbers from 0 to 1"),
        (("--convert", str(run), "--shares", "nan"), "nan: expected numbers from 0 to 1"),
        (("--convert", str(command.out)), "is no run: expected a folder runs/NAME"),
        (("--shares", "0.1"), "--shares, --rate and --keep are of a converted run"),
        (("--read", "10000000"), "--read 10000000: expected less than the held-out text has"),
        (("--heads", "3"), "dim=16 is not divisible by heads=3"),
        (("--read", "512", "--minutes", "1"), "reads was [], now [512]"),
    ):
        with pytest.raises(SystemExit):
            command("--stacks", "dense", *given)
        assert words in capsys.readouterr().err


def test_a_run_is_stopped_in_time_and_goes_on(command, monkeypatch, capsys):
    monkeypatch.setattr(equal_time, "begin", lambda *given: BEGUN)
    whole = command("--stacks", "window", "--minutes", "1")["window-0"]
    command.out.rename(command.out.with_name("whole"))
    assert not command("--stacks", "window", "--minutes", "1", "--stop-after", "0.0001")
    assert "window-0 was stopped: the same command goes on" in capsys.readouterr().out
    again = command("--stacks", "window", "--minutes", "1")["window-0"]
    assert again["at"] == whole["at"]


def test_dense_layers_of_torch_are_those_of_longnet(monkeypatch):
    monkeypatch.setattr(equal_time, "sdpa_kernel", lambda backend: nullcontext())
    config = LongNetConfig(
        dim=32,
        heads=2,
        layers=4,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=8,
        shift_keys=True,
    )
    torch.manual_seed(0)
    model, tokens = LongNetLM(config), torch.randint(256, (1, 64))
    expected = model(tokens)
    called = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **more: called.append(1) or sdpa(*x, **more))
    with equal_time.dense_by_cudnn():
        torch.testing.assert_close(model(tokens), expected)
    assert len(called) == 2
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
    assert len(called) == 2
    # Traced as training traces blocks: the oldest torch knows fewer operations.
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with equal_time.dense_by_cudnn():
        torch.testing.assert_close(model(tokens), expected)
    assert len(called) == 4


def test_a_step_is_profiled(command, tmp_path, monkeypatch, capsys):
    given = ("--data", str(tmp_path / "text"), *SIZES[:-2], "--stacks", "balanced")
    monkeypatch.setattr(sys, "argv", ["profile_training", *given])
    profile_training.main()
    said = capsys.readouterr().out
    assert "balanced, 2 x 1,024: " in said and "aten::" in said


def test_time_on_the_device_counts_once():
    at = [(0, 10), (5, 20), (30, 40), (32, 35)]
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(start, end, device, is_user_annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=is_user_annotation)

    # What runs on the host, and a name for a span of the device, are no work of the device.
    events = [*(event(*one, cuda) for one in at), event(0, 1000, cpu), event(0, 500, cuda, True)]
    watch = profile_training.Watch(profiler=SimpleNamespace(events=lambda: events))
    assert watch.busy_seconds() == pytest.approx(30e-6 / profile_training.PROFILED)


def test_generation_is_measured_for_every_stack(tmp_path, capsys):
    out = tmp_path / "generation.json"
    generation.run(out, (1500,), width=64, tokens=5, rounds=2)
    rows = {row["stack"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(equal_time.STACKS)
    assert all(len(row["token"]) == 2 and row["first"][0] > 0 for row in rows.values())
    # Of eight layers all keep every row, 64 channels of keys and values in float32, or two, or one; windows keep theirs.
    layer, sizes = 1505 * 64 * 2 * 4, {name: row["cache_bytes"] for name, row in rows.items()}
    assert 8 * layer <= sizes["dense"] < 9 * layer
    assert sizes["dense"] > sizes["window+dense 1/4"] > sizes["balanced"] > sizes["light"] > sizes["window"]
    assert "Generation" in capsys.readouterr().out
