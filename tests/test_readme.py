"""The README and the pages beside it keep their word: their Python runs, their commands and files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import typer

from longnet.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        *("README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md"),
        *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    )
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(first_word: str, text: str) -> Iterator[list[str]]:
    """The words from ``first_word`` on of every command that begins with it, alone, behind a pipe or behind torchrun's -m.

    Without comments; a line that ends with a backslash goes on.
    """
    for block in blocks("sh", text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for number, word in enumerate(words):
                if word == first_word and (number == 0 or words[number - 1] in ("|", "-m")):
                    yield words[number:]
                    break


PYTHON = [
    (f"{page}, Python block {number}", block)
    for page, text in TEXTS.items()
    for number, block in enumerate(blocks("python", text), start=1)
]
COMMANDS = list(shell_lines("longnet", README))
# Each once: pages repeat what the README shows.
ALL_COMMANDS = sorted({tuple(words) for text in TEXTS.values() for words in shell_lines("longnet", text)})
# Any: what typer builds its commands from differs between its versions.
SUBCOMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MAKE_TARGETS = {words[1] for text in TEXTS.values() for words in shell_lines("make", text)}


# PEFT asks models for what transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("where", "code"), PYTHON, ids=[where for where, _ in PYTHON])
def test_the_python_runs(where: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, as a reader copies it, and as torchrun would start one process."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    try:
        # Loops of single numbers compile in half the time.
        with torch._inductor.config.patch({"cpp.simdlen": 1}):
            exec(compile(code, where, "exec"), {})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_the_command_takes_these_options(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, rest = SUBCOMMANDS[words[1]], list(words[2:])
    if hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options
    # Parses the values too; nothing is run.
    with command.make_context(words[1], rest):
        pass


def test_all_subcommands_are_shown() -> None:
    assert {words[1] for words in COMMANDS} == set(SUBCOMMANDS)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= MAKE_TARGETS
    assert set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)) >= MAKE_TARGETS


def test_continuous_integration_runs_the_test_command() -> None:
    assert "`make test` is the test command" in README
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").endswith("\nmake test\n")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page: str) -> None:
    folder = (ROOT / page).parent
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page])]
    assert [target for target in targets if "://" not in target and target and not (folder / target).is_file()] == []


def test_the_blocks_are_seen() -> None:
    assert len([where for where, _ in PYTHON if where.startswith("README.md")]) >= 4
    assert len([where for where, _ in PYTHON if where.startswith("docs/")]) >= 30
    assert len(COMMANDS) >= 4
    assert len(ALL_COMMANDS) > len(COMMANDS)
    assert ("longnet", "train", "--cp", "2", "--batch", "2", "--out", "runs/both") in ALL_COMMANDS


def test_the_table_of_what_travels_is_what_the_script_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("traffic", ROOT / "scripts" / "traffic.py")
    assert spec is not None and spec.loader is not None
    traffic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(traffic)
    # What is behind 32 ranks takes longer and only repeats.
    monkeypatch.setattr(traffic, "RANKS", (2, 4, 8))
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- traffic -->\n")[2].splitlines()
    assert shown[:5] == traffic.table()
