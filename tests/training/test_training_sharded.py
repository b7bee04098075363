"""Checkpoints in parts: losses after resumption on any number of processes, and what a kill, a fault or damage does to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchrun import finish, start

from longnet.models import LongNetConfig
from longnet.training import CheckpointError, TrainSettings, load_model, train
from longnet.training.initial import open_initial
from longnet.training.metrics import read_metrics
from longnet.training.sharded import LATEST, WHOLE, find_checkpoint

# Of four processes one has no row of the norms of queries and keys, which have six.
MODEL = LongNetConfig(
    dim=24, heads=4, layers=1, segment_lengths=(8, 16), dilation_rates=(1, 2), qk_norm=True, tie_embeddings=False
)
HALF, STEPS = 7, 10
SCRIPT = str(Path(__file__).with_name("sharded_run.py"))
OPTIONS = {
    "adamw": {},
    "muon": {"optimizer": "muon", "lr": 0.003},
    "bfloat16": {"dtype": "bfloat16", "weights": "bfloat16"},
}
# As test_training_ranks.py has them.
APART = {"adamw": 1e-5, "muon": 2e-4, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}.\n" for n in range(30)))

    def settings(out, steps=STEPS, **changes):
        values = {
            "model": MODEL,
            "context": 60,
            "batch": 4,
            "warmup": 2,
            "schedule": "constant",
            "eval_every": 0,
            "save_every": 3,
        }
        return TrainSettings(out=str(out), data=str(folder), steps=steps, device="cpu", threads=1, **values | changes)

    return settings


@pytest.fixture(scope="module")
def several(forked):
    """Train with several processes; how each of them ended, None where it was killed."""

    def run(count, settings, resume=False, fault=None, who=(), own_out=False):
        outcome = Path(settings.out).with_suffix(".outcome")
        asked = {**settings.to_dict(), "resume": resume, "fault": fault, "who": who, "own_out": own_out}
        files = [Path(f"{outcome}{rank}") for rank in range(count)]
        for file in files:
            file.unlink(missing_ok=True)
        process = start("--nproc-per-node", str(count), SCRIPT, str(outcome), json.dumps(asked), python=forked)
        said = finish(process)
        assert fault or process.returncode == 0, said
        return [file.read_text() if file.exists() else None for file in files]

    return run


@pytest.fixture(scope="module")
def halves(make, several, tmp_path_factory):
    """By its name in OPTIONS: a run that two processes have begun, and the losses of one process that goes the whole way."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("half")
            assert several(2, make(folder / "run", HALF, cp=2, **OPTIONS[name])) == ["finished"] * 2
            train(make(folder / "alone", **OPTIONS[name]))
            found[name] = folder / "run", losses(folder / "alone")
        return found[name]

    return of


@pytest.fixture
def half(halves, tmp_path):
    """A copy of the run that two processes have begun, for a test to change."""
    shutil.copytree(halves("adamw")[0], tmp_path / "run")
    return tmp_path / "run"


def losses(out):
    return [line["loss"] for line in read_metrics(Path(out) / "metrics.jsonl")]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def part_of(run, number, step=HALF):
    return run / "checkpoint" / f"step-{step}" / f"part-{number}-of-2.safetensors"


def assembled(folder):
    """Slow and plain: each tensor in float64 from the blocks in the parts, whose names say where they lie."""
    latest = json.loads((folder / LATEST).read_text())
    tensors = {name: np.full(entry["shape"], np.nan) for name, entry in latest["tensors"].items()}
    for part in (folder / latest["folder"]).iterdir():
        with safe_open(part, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                name, first = key.rsplit("@", 1)
                block = file.get_tensor(key).double().numpy()
                first = [int(number) for number in first.split(",") if number]
                for place in np.ndindex(block.shape):
                    whole = tuple(a + b for a, b in zip(first, place, strict=True))
                    assert np.isnan(tensors[name][whole]), f"{key} comes twice"
                    tensors[name][whole] = block[place]
    return tensors


def test_parts_hold_each_element_once_and_the_model_is_written_from_them(halves, make, tmp_path):
    run, _ = halves("adamw")
    checkpoint = run / "checkpoint"
    parts = [f"step-{HALF}/part-{number}-of-2.safetensors" for number in (1, 2)]
    assert names(checkpoint) == [LATEST, f"step-{HALF}", *parts]
    # The bytes of the state are halved.
    sizes = [(checkpoint / part).stat().st_size for part in parts]
    assert max(sizes) < 0.6 * sum(sizes)
    found = assembled(checkpoint)
    assert not any(np.isnan(value).any() for value in found.values())
    model = load_file(run / "model.safetensors")
    assert {name.removeprefix("model.") for name in found if name.startswith("model.")} == model.keys()
    for name, weight in model.items():
        assert np.array_equal(found[f"model.{name}"], weight.double().numpy()), name
    # One process writes the same names; both have made the same steps.
    train(make(tmp_path / "one", HALF))
    one = load_file(tmp_path / "one" / "checkpoint" / WHOLE)
    assert one.keys() == found.keys()
    for name, value in one.items():
        want = value.double().numpy()
        assert np.allclose(found[name], want, rtol=1e-3, atol=1e-4 * np.abs(want).max()), name


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("count", "cp"), [(1, 1), (2, 2), (4, 2)])
def test_any_number_of_processes_goes_on_with_the_parts(halves, make, several, tmp_path, name, count, cp):
    before, want = halves(name)
    shutil.copytree(before, tmp_path / "run")
    settings = make(tmp_path / "run", cp=cp, **OPTIONS[name])
    if count == 1:
        train(settings, resume=True)
    else:
        assert several(count, settings, resume=True) == ["finished"] * count
    found = losses(tmp_path / "run")
    assert found[:HALF] == losses(before)
    assert found == pytest.approx(want, rel=APART[name])
    kinds = {1: [WHOLE], 2: [LATEST], 4: [LATEST]}
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir() if path.is_file()] == kinds[count]
    # It can be read whatever wrote it, and the model is that of the last step.
    state = find_checkpoint(tmp_path / "run" / "checkpoint")
    assert state.progress["step"] == STEPS
    model = load_model(tmp_path / "run").state_dict()
    for weight, value in state.weights().items():
        assert torch.equal(model[weight], value), weight


@pytest.mark.parametrize(("count", "cp"), [(2, 1), (3, 3)])
def test_a_run_of_one_process_goes_on_with_several(halves, make, several, tmp_path, count, cp):
    settings = make(tmp_path / "run", HALF)
    train(settings)
    assert several(count, make(tmp_path / "run", batch=4, cp=cp), resume=True) == ["finished"] * count
    assert losses(tmp_path / "run") == pytest.approx(halves("adamw")[1], rel=APART["adamw"])
    assert not (tmp_path / "run" / "checkpoint" / WHOLE).exists()


def test_the_same_processes_have_the_losses_of_an_uninterrupted_run_bit_for_bit(make, several, tmp_path):
    """With dropout: each process draws random numbers of its own."""
    model = MODEL.replace(dropout=0.2)
    whole, parts = (make(tmp_path / name, cp=2, model=model) for name in ("whole", "parts"))
    assert several(2, whole) == ["finished"] * 2
    assert several(2, parts.replace(steps=HALF)) == several(2, parts, resume=True) == ["finished"] * 2
    assert losses(parts.out) == losses(whole.out)
    assert assembled(Path(parts.out) / "checkpoint").keys() == assembled(Path(whole.out) / "checkpoint").keys()
    for name, value in assembled(Path(parts.out) / "checkpoint").items():
        assert np.array_equal(value, assembled(Path(whole.out) / "checkpoint")[name]), name


def test_several_processes_write_one_whole_file_on_request(halves, half, make, several):
    settings = make(half, cp=2, checkpoint="whole")
    assert several(2, settings, resume=True) == ["finished"] * 2
    assert names(half / "checkpoint") == [WHOLE]
    assert losses(half) == pytest.approx(halves("adamw")[1], rel=APART["adamw"])
    assert load_file(half / "checkpoint" / WHOLE).keys() == find_checkpoint(half / "checkpoint").tensors.keys()


def test_steps_go_on_while_parts_are_written(make, several, tmp_path):
    """A part of step 6 is not written before step 8 is done."""
    assert several(2, make(tmp_path / "run", cp=2), fault="slow", who=[1]) == ["finished"] * 2
    assert (tmp_path / "run" / "waited").exists()
    assert find_checkpoint(tmp_path / "run" / "checkpoint").progress["step"] == STEPS


@pytest.mark.parametrize(
    ("fault", "who", "step", "left"),
    [
        ("killed before its part", [1], 3, ["step-3", "step-6"]),
        ("killed before the commit", [0], 3, ["step-3", "step-6"]),
        ("killed before its part", [0, 1], 3, ["step-3", "step-6"]),
        ("killed after the commit", [0], 6, ["step-3", "step-6"]),
    ],
)
def test_after_a_kill_while_a_checkpoint_is_written_the_last_one_is_whole(
    halves, make, several, tmp_path, fault, who, step, left
):
    ends = several(2, make(tmp_path / "run", cp=2), fault=fault, who=who)
    assert all(ends[rank] is None for rank in who) and "finished" not in ends
    checkpoint = tmp_path / "run" / "checkpoint"
    assert [name for name in names(checkpoint) if name.startswith("step-") and "/" not in name] == left
    assert find_checkpoint(checkpoint).progress["step"] == step
    train(make(tmp_path / "run"), resume=True)
    assert losses(tmp_path / "run") == pytest.approx(halves("adamw")[1], rel=APART["adamw"])
    assert names(checkpoint) == [WHOLE]


def test_leftovers_of_an_unfinished_save_are_removed_and_written_anew(half, make, several):
    """A run that is killed before step 9 is committed, then saves step 9 again."""
    (half / "checkpoint" / "step-9").mkdir()
    (half / "checkpoint" / "step-9" / "part-1-of-3.safetensors").write_text("half")
    (half / "checkpoint" / f".{LATEST}.partial").write_text("{")
    assert several(2, make(half, 9, cp=2), resume=True) == ["finished"] * 2
    parts = [f"step-9/part-{number}-of-2.safetensors" for number in (1, 2)]
    assert names(half / "checkpoint") == [LATEST, "step-9", *parts]


def test_a_part_that_cannot_be_written_ends_the_run_with_its_name(make, several, tmp_path):
    ends = several(2, make(tmp_path / "run", cp=2), fault="disk full", who=[1])
    assert len(set(ends)) == 1 and ends[0].startswith("OSError: [Errno 28] No space left on device: "), ends
    assert "checkpoint/step-6/part" in ends[0]
    assert find_checkpoint(tmp_path / "run" / "checkpoint").progress["step"] == 3
    train(make(tmp_path / "run"), resume=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def swap(run):
    first, second = (part_of(run, number) for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit(run, **changes):
    latest = run / "checkpoint" / LATEST
    latest.write_text(json.dumps(json.loads(latest.read_text()) | changes))


DAMAGE = {
    "missing": (lambda run: part_of(run, 2).unlink(), "part-2-of-2.safetensors is not there: expected a file of"),
    "truncated": (
        lambda run: part_of(run, 1).write_bytes(part_of(run, 1).read_bytes()[:-10]),
        "part-1-of-2.safetensors holds [0-9,]+ bytes, expected [0-9,]+: it is damaged, or another file took its place",
    ),
    "changed": (lambda run: flip(part_of(run, 2)), "part-2-of-2.safetensors is damaged: its content does not match"),
    "another step": (
        lambda run: edit(run, folder="step-3"),
        "latest.json is damaged: its content does not match its digest",
    ),
    "no JSON": (
        lambda run: (run / "checkpoint" / LATEST).write_text("{"),
        "latest.json is not JSON: .*; it is truncated or damaged",
    ),
    "future": (
        lambda run: edit(run, format="longnet-sharded-training-state-9"),
        "its format is '.*-9', expected '.*-1'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_the_name_of_the_file_before_anything_is_changed(half, make, kind):
    harm, message = DAMAGE[kind]
    harm(half)
    before = contents(half)
    with pytest.raises(CheckpointError, match=message):
        train(make(half), resume=True)
    assert contents(half) == before


def test_damage_is_refused_by_all_of_several_processes(half, make, several):
    flip(part_of(half, 2))
    before = contents(half)
    (end, other) = several(2, make(half, cp=2), resume=True)
    assert end == other and end.startswith("CheckpointError: ") and "part-2-of-2.safetensors is damaged" in end
    assert contents(half) == before


def test_a_part_of_another_save_is_refused(half, make, several, tmp_path):
    """Of the same run, step, size and place."""
    assert several(2, make(tmp_path / "other", HALF, cp=2)) == ["finished"] * 2
    shutil.copyfile(part_of(tmp_path / "other", 1), part_of(half, 1))
    before = contents(half)
    with pytest.raises(
        CheckpointError, match=r"part-1-of-2.safetensors is of another save \(\w{32}\): expected \w{32}"
    ):
        train(make(half), resume=True)
    assert contents(half) == before


def test_parts_that_have_changed_places_are_refused(half, make):
    swap(half)
    with pytest.raises(CheckpointError, match="part-1-of-2.safetensors"):
        train(make(half), resume=True)


def test_the_checkpoint_of_another_run_is_refused(half, make):
    with pytest.raises(ValueError, match="seed was 0, now 5"):
        train(make(half, seed=5), resume=True)
    run = half / "run.json"
    run.write_text(run.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(
        CheckpointError, match=r"latest.json belongs to another run than .*run.json.*: seed was 5, now 0"
    ):
        train(make(half, seed=5), resume=True)


def test_a_model_that_is_missing_or_old_is_written_from_the_parts(half, make):
    want = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").unlink()
    train(make(half, HALF), resume=True)
    assert (half / "model.safetensors").read_bytes() == want


@pytest.mark.parametrize("place", [".", "checkpoint", f"checkpoint/{LATEST}"])
def test_a_run_begins_with_the_weights_of_parts(halves, make, tmp_path, place):
    run, _ = halves("adamw")
    config, read = open_initial(str(run / place))
    model = load_file(run / "model.safetensors")
    assert config == MODEL and read().keys() == model.keys()
    assert all(torch.equal(value, model[name]) for name, value in read().items())
    assert train(make(tmp_path / "run", 1, init_from=str(run / place))).step == 1


def test_of_two_kinds_of_checkpoint_the_later_step_is_the_last(half, make, tmp_path):
    """A kill came between the commit of one and the removal of the other."""
    train(make(tmp_path / "one", 4))
    shutil.copy(tmp_path / "one" / "checkpoint" / WHOLE, half / "checkpoint")
    assert find_checkpoint(half / "checkpoint").path.name == LATEST
    train(make(tmp_path / "one", 8), resume=True)
    shutil.copy(tmp_path / "one" / "checkpoint" / WHOLE, half / "checkpoint")
    assert find_checkpoint(half / "checkpoint").path.name == WHOLE


def test_a_folder_that_processes_do_not_share_is_refused(make, several, tmp_path):
    """Each process has a disk of its own: here, a folder."""
    for end in several(2, make(tmp_path / "run", cp=2), own_out=True):
        assert end.startswith("ValueError: checkpoint='sharded' and out=") and "1 of 2 processes do not see what" in end
    assert not (tmp_path / "run0").exists() and not (tmp_path / "run1").exists()


def test_a_folder_with_the_checkpoints_of_something_else_is_refused_and_left(make, tmp_path):
    own = tmp_path / "run" / "checkpoint" / "step-100"
    own.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds \['checkpoint/step-100'\], which a run would overwrite"):
        train(make(tmp_path / "run"))
    assert own.is_dir()
