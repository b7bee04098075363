"""``longnet generate``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Longnet = Callable[..., "subprocess.CompletedProcess[str]"]
StartLongnet = Callable[..., "subprocess.Popen[str]"]


def test_the_text_is_on_stdout_alone_and_a_seed_repeats_it(finished_run: Path, longnet: Longnet) -> None:
    arguments = ("generate", finished_run, "--prompt", "line 7: ", "--tokens", 30, "--device", "cpu")
    first, again = longnet(*arguments), longnet(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("line 7: ")
    assert "Generating 30 bytes after 8" in first.stderr
    assert longnet(*arguments, "--seed", 1).stdout != first.stdout


def test_it_ends_after_a_text(finished_run: Path, longnet: Longnet) -> None:
    arguments = ("generate", finished_run, "--prompt", "line 7: ", "--tokens", 60, "--device", "cpu")
    text = longnet(*arguments).stdout.removesuffix("\n")
    drawn = text.removeprefix("line 7: ")
    # Of a byte that is no character the text shows something else.
    found = re.search(r"[!-~]{2}", drawn[2:])
    assert found is not None
    end = found.group()
    stopped = longnet(*arguments, "--stop", "never drawn", "--stop", end)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == "line 7: " + drawn[: drawn.index(end) + 2] + "\n"


def test_bytes_are_shown_as_they_are_drawn(finished_run: Path, start_longnet: StartLongnet) -> None:
    process = start_longnet("generate", finished_run, "--prompt", "line 7: ", "--tokens", 10**7, "--device", "cpu")
    try:
        assert process.stdout is not None
        assert process.stdout.read(28).startswith("line 7: ")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_prompt_from_a_file_or_standard_input(finished_run: Path, longnet: Longnet, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"caf\xc3\xa9 ")
    from_file = longnet("generate", finished_run, "--file", tmp_path / "prompt.txt", "--tokens", 5, "--temperature", 0)
    from_input = longnet("generate", finished_run, "--file", "-", "--tokens", 5, "--temperature", 0, stdin="café ")
    assert from_file.stdout.startswith("café ")
    assert from_file.stdout == from_input.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a prompt, either as --prompt TEXT or as --file PATH"),
        (["--prompt", "a", "--file", "b"], "expected a prompt, either"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--tokens", "0"], "tokens=0: expected at least 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["--prompt", "a", "--top-k", "0"], "top_k=0"),
        (["--prompt", "a", "--stop", ""], "stop is empty: expected at least one character"),
        (["--prompt", "a", "--device", "abacus"], "device='abacus' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    finished_run: Path, call: Longnet, arguments: list[str], message: str
) -> None:
    result = call("generate", finished_run, *arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("longnet: error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_no_run_is_said(tmp_path: Path, call: Longnet) -> None:
    result = call("generate", tmp_path, "--prompt", "a")
    assert result.returncode == 2
    assert "holds no run (no run.json): expected the --out folder of longnet train" in result.stderr
