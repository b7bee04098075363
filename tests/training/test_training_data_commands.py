"""The options of ``longnet prepare``, ``train`` and ``tokenizer train`` that name data and folders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longnet.cli.main import run as run_main
from longnet.training.data import read_corpus


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Run ``longnet`` in this process: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["longnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            run_main()
        written = capsys.readouterr()
        return done.value.code, written.out, written.err

    return run


@pytest.mark.parametrize("name", ["prepare", "train", "tokenizer train"])
def test_one_data_and_paths_that_are_not_empty(
    name: str, command: Callable[..., tuple[object, str, str]], text_folder: Path, tmp_path: Path
) -> None:
    words, out = name.split(), tmp_path / "out"
    code, _, error = command(*words, "--data", text_folder, "--data", text_folder, "--out", out)
    assert code == 2 and "--data given 2 times: expected one file or folder" in error
    for data, place, option in (("", out, "--data"), (text_folder, "", "--out")):
        code, _, error = command(*words, "--data", data, "--out", place)
        assert code == 2 and f"'{option}': '' is empty" in error
    code, _, error = command(*words, "--data", text_folder, "--out", text_folder / "new")
    assert code == 2 and "lies in data=" in error and not (text_folder / "new").exists()
    code, _, error = command(*words, "--data", text_folder, "--out", text_folder / "a" / "01.txt" / "x")
    assert code == 2 and "01.txt', a file: expected a folder" in error
    assert not out.exists()


def test_prepare_refuses_a_folder_of_other_files(
    command: Callable[..., tuple[object, str, str]], text_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("notes")
    code, _, error = command("prepare", "--data", text_folder, "--out", tmp_path / "other")
    assert code == 2 and "holds notes.txt: expected a new or empty folder" in error
    assert [one.name for one in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_path_with_a_space_is_quoted_and_the_progress_ends(
    command: Callable[..., tuple[object, str, str]], text_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a b"
    code, said, _ = command("tokenizer", "train", "--data", text_folder, "--vocab", "270", "--out", out)
    assert code == 0 and f"longnet train --tokenizer '{out}' --out RUN" in said
    assert "Training a vocabulary of 270 100%" in said
    code, _, error = command("tokenizer", "train", "--data", text_folder, "--vocab", "270", "--out", out)
    assert code == 2 and "holds a tokenizer.json" in error
    code, said, _ = command("prepare", "--data", text_folder, "--out", tmp_path / "c d")
    assert code == 0 and f"longnet train --data '{tmp_path / 'c d'}' --out RUN" in said


def test_a_tokenizer_learns_from_text_alone(command: Callable[..., tuple[object, str, str]], tmp_path: Path) -> None:
    np.arange(500, dtype="<u2").tofile(tmp_path / "one.bin")
    code, _, error = command("tokenizer", "train", "--data", tmp_path / "one.bin", "--out", tmp_path / "out")
    assert code == 2 and "holds shards of tokens: expected text" in error and not (tmp_path / "out").exists()


def test_options_for_rows_with_prepared_data_are_refused_by_the_command(
    command: Callable[..., tuple[object, str, str]], text_folder: Path, tmp_path: Path
) -> None:
    read_corpus(text_folder, folder=tmp_path / "data")
    for option in (["--field", "text"], ["--skip-bad-rows"]):
        code, _, error = command("train", "--data", tmp_path / "data", *option, "--out", tmp_path / "out")
        assert code == 2 and f"{option[0]} with --data {tmp_path / 'data'}, which is prepared" in error


@pytest.mark.parametrize("option", ["--init-from", "--config"])
def test_other_paths_of_train_are_not_empty(
    option: str, command: Callable[..., tuple[object, str, str]], tmp_path: Path
) -> None:
    code, _, error = command("train", option, "", "--out", tmp_path / "out")
    assert code == 2 and f"'{option}': '' is empty" in error and not (tmp_path / "out").exists()
