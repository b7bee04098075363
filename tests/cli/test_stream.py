"""``longnet stream`` as a user runs it: killed, resumed, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import make_run

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]
StartLongnet = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "text.txt"
    path.write_text("".join(f"line {n}: the square of {n} is {n * n}\n" for n in range(4000)))
    return path


def _result(out: Path) -> dict[str, Any]:
    line = json.loads((out / "stream.jsonl").read_text().splitlines()[-1])
    return {name: line[name] for name in ("kind", "position", "bits_per_byte", "decades")}


def _wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    record, deadline = out / "stream.jsonl", time.monotonic() + 90
    while not record.exists() or record.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the stream ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_twice_and_resumed_it_ends_as_one_that_was_not(
    tmp_path: Path, run: Path, text: Path, longnet: Longnet, start_longnet: StartLongnet
) -> None:
    arguments = ["stream", run, "--data", text, "--tokens", 40000, "--chunk", 64, "--device", "cpu"]
    whole = longnet(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "parts"
    for count, resume in ((20, []), (100, ["--resume"])):
        process = start_longnet(*arguments, "--save-every", 0, "--out", out, *resume)
        try:
            _wait_for_lines(out, count, process)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    result = longnet("stream", run, "--out", out, "--resume", "--save-every", 30)
    assert result.returncode == 0, result.stderr
    assert "Resuming after" in result.stderr
    assert _result(out) == _result(tmp_path / "whole")
    assert result.stdout.splitlines()[:7] == whole.stdout.splitlines()[:7]


def test_a_pipe_without_an_end_is_stopped_at_once_and_gone_on_with(
    tmp_path: Path, run: Path, text: Path, longnet: Longnet, start_longnet: StartLongnet
) -> None:
    content = text.read_text()[:3000]
    arguments = ["stream", run, "--data", "-", "--chunk", 1000, "--save-every", 0, "--device", "cpu"]
    process = start_longnet(*arguments, "--out", tmp_path / "out")
    try:
        assert process.stdin is not None
        process.stdin.write(content[:2500])
        process.stdin.flush()
        _wait_for_lines(tmp_path / "out", 3, process)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        # The pipe stays open: the command must not wait for it to end.
        process.wait(timeout=60)
        assert process.stderr is not None
        error = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert (
        f"Stopped and saved after 2,000 bytes. To continue: longnet stream {run} --out {tmp_path / 'out'} --resume"
        in error
    )
    result = longnet("stream", run, "--out", tmp_path / "out", "--resume", stdin=content)
    assert result.returncode == 0, result.stderr
    (tmp_path / "same.txt").write_text(content)
    whole = longnet("stream", run, "--data", tmp_path / "same.txt", "--chunk", 1000, "--out", tmp_path / "whole")
    assert _result(tmp_path / "out") == _result(tmp_path / "whole")
    assert result.stdout.splitlines()[:6] == whole.stdout.splitlines()[:6]


def test_the_table_is_on_stdout_and_the_record_below_the_run(tmp_path: Path, text: Path, longnet: Longnet) -> None:
    run = make_run(tmp_path / "run")
    result = longnet("stream", run, "--data", text, "--tokens", 10**9, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["position", "bytes", "bits", "per", "byte"]
    assert [line.split()[0] for line in lines[1:7]] == ["0", "10", "100", "1,000", "10,000", "100,000"]
    assert "tokens/s, peak memory" in result.stdout
    assert "The data ended after" in result.stderr and "Streaming 100%" in result.stderr
    assert {path.name for path in (run / "stream").iterdir()} == {"stream.jsonl", "state.safetensors"}
    settings = json.loads((run / "stream" / "stream.jsonl").read_text().splitlines()[0])
    assert settings["chunk"] == 8192 and settings["dtype"] == "float32" and settings["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected data to read, as --data PATH"),
        (["--data", "gone.txt"], "gone.txt' is not there: expected a file or a folder, or '-'"),
        (["--data", "-", "--data", "gone.txt"], "expected '-' (standard input) alone"),
        (["--data", "EMPTY"], "hold no bytes: expected at least 2"),
        (["--data", "ONE"], "data hold 1 byte(s): expected at least 2"),
        (["--data", "TEXT", "--tokens", "1"], "tokens=1: expected at least 2"),
        (["--data", "TEXT", "--tokens", "-5"], "tokens=-5: expected at least 2"),
        (["--data", "TEXT", "--chunk", "1"], "chunk=1: expected at least 2"),
        (["--data", "TEXT", "--dtype", "int8"], "dtype='int8' is unknown: expected one of"),
        (["--data", "TEXT", "--device", "abacus"], "device='abacus' cannot be used"),
        (["--data", "TEXT", "--save-every", "-1"], "save_every=-1.0: expected a number of seconds"),
        (["--resume"], "holds no stream (no state.safetensors)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, run: Path, text: Path, call: Longnet, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "one").write_bytes(b"x")
    paths = {"EMPTY": str(tmp_path / "empty"), "ONE": str(tmp_path / "one"), "TEXT": str(text)}
    result = call("stream", run, "--out", tmp_path / "out", *(paths.get(x, x) for x in arguments))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("longnet: error: ")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_and_one_with_a_stream(tmp_path: Path, text: Path, call: Longnet) -> None:
    result = call("stream", tmp_path, "--data", text)
    assert result.returncode == 2
    assert "holds no run (no run.json): expected the --out folder of longnet train" in result.stderr
    run = make_run(tmp_path / "run")
    (run / "stream").mkdir()
    (run / "stream" / "state.safetensors").write_bytes(b"text")
    result = call("stream", run, "--data", text)
    assert "already holds a stream: expected another folder, or --resume to continue this one" in result.stderr
    result = call("stream", run, "--resume")
    assert result.returncode == 2
    assert "state.safetensors is truncated or not a safetensors file" in result.stderr
    assert (run / "stream" / "state.safetensors").read_bytes() == b"text"
