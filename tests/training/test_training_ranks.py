"""Training over processes that torchrun starts: the losses of one process, whatever happens to some of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from torchrun import ENVIRONMENT, PATIENCE, finish, start, workers

from longnet.models import LongNetConfig, LongNetLM
from longnet.training import save_model
from longnet.training.lock import locked

STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}.\n" for n in range(60)))
    return folder


def command(data, out, *more):
    return [
        "-m", "longnet", "train", "--preset", "nano", "--data", str(data), "--context", "200", "--batch", "2",
        "--steps", str(STEPS), "--schedule", "constant", "--device", "cpu", "--dtype", "float32", "--eval-every", "7",
        "--save-every", "3", "--out", str(out), *more,
    ]  # fmt: skip


def metrics(out):
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, forked):
    """The metrics of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run([*forked, *command(data, out)], env=ENVIRONMENT, check=True, capture_output=True)
    return metrics(out)


def same_losses(found, want):
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in want]
    for got, expected in zip(found, want, strict=True):
        assert abs(got["loss"] - expected["loss"]) < 1e-5 * expected["loss"], got


def test_a_process_is_killed_and_fewer_go_on_as_two_hosts(data, tmp_path, alone, forked):
    """The first process is killed, which prints for all. They are ordinary processes, as a user starts them."""
    out = tmp_path / "run"
    process = start("--nproc-per-node", "3", *command(data, out, "--cp", "3", "--steps", "100000"))
    begun = time.monotonic()
    while not any(line["step"] >= 4 for line in metrics(out)):
        assert process.poll() is None and time.monotonic() < begun + PATIENCE, finish(process)
        time.sleep(0.05)
    # Signal 19 stops them all where they are, so that the run is killed within its steps.
    for pid in workers(process):
        os.kill(pid, signal.SIGSTOP)
    assert max(line["step"] for line in metrics(out)) < STEPS, "too late"
    os.kill(workers(process)[0], signal.SIGKILL)
    for pid in workers(process):
        os.kill(pid, signal.SIGCONT)
    said = finish(process)
    assert process.returncode != 0
    assert "process 0 of 3 is gone" in said and said.count("longnet: error") == 1, said

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [
        start(
            "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
            "--master-port", str(port), *command(data, out, "--cp", "2", "--resume"), python=forked,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [finish(host) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "Resuming after step" in said[0] and "Resuming" not in said[1], said
    same_losses(metrics(out), alone)


def test_windows_side_by_side(data, tmp_path, alone, forked):
    """Without --cp every process takes windows of its own from the batch."""
    tracked = command(data, tmp_path / "run", "--track", "tensorboard")
    process = start("--nproc-per-node", "2", *tracked, python=forked)
    said = finish(process)
    assert process.returncode == 0, said
    # The first process alone tracks.
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert "2 x 1, windows side by side x shards of each" in said
    same_losses(metrics(tmp_path / "run"), alone)
    assert (tmp_path / "run" / "report.html").exists()


OF_EVERY_KIND = {
    "layers": 4, "dim": 32, "heads": 4, "dropout": 0.2, "gradient_checkpointing": True, "segment_lengths": [32, 200],
    "dilation_rates": [1, 2], "sliding_window": 24, "stride": 2, "shift_keys": True,
    "layer_types": ["sliding_attention", "dilated_attention", "strided_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(("cp", "gathered"), [(1, "as-one"), (1, "by-block"), (2, "by-block")])
def test_compiled_blocks_learn_the_same_over_processes(data, tmp_path, forked, cp, gathered):
    config, said = tmp_path / "config.json", {}
    config.write_text(json.dumps(OF_EVERY_KIND))
    for kind in ("--compile", "--no-compile"):
        _, _, *given = command(
            data, tmp_path / kind, "--config", str(config), "--cp", str(cp), "--steps", "4", "--eval-every", "2", kind
        )
        given = [one for one in given if one not in ("--preset", "nano")]
        script = str(Path(__file__).with_name("compiled_run.py"))
        process = start("--nproc-per-node", "2", script, gathered, *given, python=forked)
        said[kind] = finish(process)
        assert process.returncode == 0, said[kind]
    assert "Compiling the blocks" in said["--compile"] and "\n0 graphs" not in said["--compile"]
    assert said["--no-compile"].count("\n0 graphs") == 2
    same_losses(metrics(tmp_path / "--compile"), metrics(tmp_path / "--no-compile"))


def test_windows_are_cut_for_equal_work(data, tmp_path, forked):
    """Later parts read more keys in the full layer, and are shorter: losses and evaluations are those of one process."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(OF_EVERY_KIND | {"dropout": 0.0, "layer_types": ["full_attention", "strided_attention"] * 2})
    )
    given = {}
    for out in ("of three", "of one"):
        options = ("--config", str(config), "--context", "800", "--steps", "4", "--eval-every", "2")
        given[out] = command(data, tmp_path / out / "run", *options)
        given[out] = [one for one in given[out] if one not in ("--preset", "nano")]
    process = start("--nproc-per-node", "3", *given["of three"], "--cp", "3", python=forked)
    said = finish(process)
    assert process.returncode == 0 and said.count("Processes share a window of 800 tokens in parts of ") == 1, said
    subprocess.run([*forked, *given["of one"]], env=ENVIRONMENT, check=True, capture_output=True)
    same_losses(metrics(tmp_path / "of three" / "run"), metrics(tmp_path / "of one" / "run"))


def test_every_process_begins_with_the_weights_that_are_given(data, tmp_path, forked):
    save_model(LongNetLM(LongNetConfig.preset("nano")), tmp_path / "first")
    options = ("--init-from", str(tmp_path / "first"), "--steps", "3")
    process = start("--nproc-per-node", "2", *command(data, tmp_path / "run", *options, "--cp", "2"), python=forked)
    said = finish(process)
    assert process.returncode == 0 and said.count("Starting from the weights of ") == 1, said
    one = [*forked, *command(data, tmp_path / "one", *options)]
    subprocess.run(one, env=ENVIRONMENT, check=True, capture_output=True)
    same_losses(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


def test_a_transformer_over_processes_has_the_losses_of_one(data, tmp_path, forked):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=256, bos_token_id=1, eos_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    options = ("--init-from", str(tmp_path / "llama"), "--steps", "3", "--pack", "documents")
    whole = [one for one in command(data, tmp_path / "run", *options) if one not in ("--preset", "nano")]
    process = start("--nproc-per-node", "2", *whole, python=forked)
    said = finish(process)
    assert process.returncode == 0 and "2 x 1, windows side by side x shards of each" in said, said
    one = [str(tmp_path / "one") if part == str(tmp_path / "run") else part for part in whole]
    subprocess.run([*forked, *one], env=ENVIRONMENT, check=True, capture_output=True)
    same_losses(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


BFLOAT16 = ("--dtype", "bfloat16", "--weights", "bfloat16")
MUON = ("--optimizer", "muon", "--lr", "0.003")


@pytest.mark.parametrize(
    ("options", "words", "apart"),
    [(BFLOAT16, "in bfloat16 and bfloat16 weights", 0.02), (MUON, "Muon trains the blocks' matrices", 2e-4)],
)
def test_what_rounds_to_bfloat16_over_processes(data, tmp_path, forked, options, words, apart):
    """Two processes share each window, and one goes on with what they saved."""
    out = tmp_path / "run"
    process = start("--nproc-per-node", "2", *command(data, out, *options, "--cp", "2", "--steps", "7"), python=forked)
    said = finish(process)
    assert process.returncode == 0 and words in said, said
    more = ("--resume", "--cp", "1", "--steps", "9")
    subprocess.run(
        [*forked, "-m", "longnet", "train", "--out", str(out), *more], env=ENVIRONMENT, check=True, capture_output=True
    )
    run = tmp_path / "alone"
    subprocess.run(
        [*forked, *command(data, run, *options, "--steps", "9")], env=ENVIRONMENT, check=True, capture_output=True
    )
    shared, one = ([line["loss"] for line in metrics(folder)] for folder in (out, run))
    assert shared == pytest.approx(one, rel=apart)


@pytest.mark.parametrize(
    ("more", "said"),
    [(("--cp", "3"), "cp=3 with 2 process(es): expected a divisor"), (("--batch", "3"), "batch=3 over 2 groups")],
)
def test_what_does_not_fit_is_said(data, tmp_path, more, said, forked):
    process = start("--nproc-per-node", "2", *command(data, tmp_path / "run", *more), python=forked)
    assert finish(process).count(said) == 1 and process.returncode != 0
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_alone_is_said(tmp_path, forked):
    # The first process ends after the other has said its error: torchrun stops the others once one has ended.
    (tmp_path / "one.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from longnet.cli.once import say_once\n"
        "say_once(f\"of {os.environ['RANK']}\")\n"
        "sys.stderr.flush()\n"
        f"other = Path({str(tmp_path / 'said')!r})\n"
        "end = time.monotonic() + 60\n"
        "if os.environ['RANK'] == '1':\n"
        "    other.touch()\n"
        "while not other.exists() and time.monotonic() < end:\n"
        "    time.sleep(0.01)\n"
        "raise SystemExit(2)\n"
    )
    said = finish(start("--nproc-per-node", "2", str(tmp_path / "one.py"), python=forked))
    assert said.count("of 0") == said.count("of 1") == 1, said


def test_a_folder_in_use_is_said_once(data, tmp_path, forked):
    """The first process alone looks, and the others do not wait for it."""
    with locked(tmp_path / "run"):
        process = start("--nproc-per-node", "2", *command(data, tmp_path / "run"), python=forked)
        said = finish(process)
    assert process.returncode != 0
    assert said.count(f"run' is in use by another process ({os.getpid()})") == 1 and "is gone" not in said, said
    assert not (tmp_path / "run").exists()


def test_cp_without_torchrun_says_how(data, tmp_path, forked):
    found = subprocess.run(
        [*forked, *command(data, tmp_path / "run", "--cp", "2")], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert found.returncode == 2 and "start with torchrun --nproc-per-node" in found.stderr
