"""What is checked before a run begins, what a resumed run compares, and what is left when it is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cohorts import make_cohort, settings_of
from safetensors.torch import load_file, save_file

from longnet.gigapath import SlideEncoder
from longnet.slides.finetune import FinetuneSettings, finetune
from longnet.slides.finetune.start import prepare
from longnet.slides.finetune.table import read_cohort
from longnet.slides.finetune.workers import Workers
from longnet.training.progress import SilentReporter


class Said(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return make_cohort(tmp_path / "cohort", "--patients", 12, "--tiles", 10, "--channels", 8)


def begin(cohort: Path, out: Path, **changes: Any) -> list[str]:
    """Prepare a run without training; what is said."""
    settings, said = settings_of(cohort, out, **changes), Said()
    out.mkdir(exist_ok=True)
    prepare(settings, read_cohort(settings), Workers(), said)
    return said.lines


def overwrite(path: Path, channels: int = 8) -> None:
    """Other numbers of the same size, at another time."""
    held, state = load_file(path), path.stat()
    held["features"] = torch.randn(len(held["features"]), channels, dtype=torch.float16)
    path.unlink()
    save_file(held, path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def test_slides_that_changed_are_refused_on_resume(cohort: Path, tmp_path: Path) -> None:
    begin(cohort, tmp_path / "out")
    assert begin(cohort, tmp_path / "out") == [f"Continuing the run in {tmp_path / 'out'}"]
    for path in sorted((cohort / "features").iterdir())[:5]:
        overwrite(path)
    with pytest.raises(
        ValueError,
        match=r"another run: 5 of 12 slides changed, .*P000-0\.safetensors, .* and 2 more\. Expected the same",
    ):
        begin(cohort, tmp_path / "out")


def test_slides_that_were_copied_are_the_same(cohort: Path, tmp_path: Path) -> None:
    begin(cohort, tmp_path / "out")
    shutil.copytree(cohort / "features", tmp_path / "copy", copy_function=shutil.copyfile)
    lines = begin(cohort, tmp_path / "out", features=str(tmp_path / "copy"))
    assert lines == [f"Continuing the run in {tmp_path / 'out'}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_out": "5"}, "layers=.*5"),
        ({"folds": 30}, "12 patients for 30 parts"),
        ({"task": "regression", "label_columns": "constant"}, "column 'constant': every slide has 3"),
    ],
)
def test_a_run_that_is_refused_leaves_its_folder_free(
    cohort: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    table = (cohort / "table.csv").read_text().splitlines()
    (cohort / "table.csv").write_text("\n".join([f"{table[0]},constant", *(f"{line},3" for line in table[1:])]))
    with pytest.raises(ValueError, match=message):
        finetune(settings_of(cohort, tmp_path / "out", **changes))
    assert {one.name for one in (tmp_path / "out").glob("*")} <= {".lock"}
    assert begin(cohort, tmp_path / "out") == []
    assert (tmp_path / "out" / "settings.json").is_file()


def test_all_slides_that_cannot_be_used_are_counted(cohort: Path, tmp_path: Path) -> None:
    files = sorted((cohort / "features").iterdir())
    for path in files[:2]:
        path.write_bytes(b"broken")
    # The first that can be read is of the minority: it is to blame, not the others.
    for path in files[2:4]:
        overwrite(path, 9)
    with pytest.raises(ValueError, match="4 of 12 slides cannot be used") as error:
        finetune(settings_of(cohort, tmp_path / "out"))
    text = str(error.value)
    assert f"{files[2]} has tiles of 9 channels: expected 8, as 8 of 12 slides have; and 1 more" in text
    assert f"{files[0]} cannot be read" in text and str(files[1]) in text and str(files[3]) not in text


def test_files_that_are_not_there_name_their_argument(cohort: Path, tmp_path: Path) -> None:
    values = settings_of(cohort, tmp_path / "out").to_dict()
    with pytest.raises(FileNotFoundError, match=r"^table='no\.csv' is not a file: expected a CSV file"):
        finetune(FinetuneSettings(**values | {"table": "no.csv"}))
    with pytest.raises(FileNotFoundError, match=r"^checkpoint='no\.pth' is not a file: expected"):
        finetune(FinetuneSettings(**values | {"checkpoint": "no.pth", "dim": None, "depth": None}))


def tuned(path: Path) -> Path:
    """A fine-tuned file of random weights, whose names have a prefix."""
    names = SlideEncoder(32, 1, in_dim=8).upstream_state_dict()
    head = {"classifier.0.weight": torch.zeros(2, 32), "classifier.0.bias": torch.zeros(2)}
    torch.save({f"slide_encoder.{name}": one for name, one in names.items()} | head, path)
    return path


def test_what_a_checkpoint_holds_besides_is_said(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet.gigapath.encoder.ARCHITECTURES", {"gigapath_slide_enc12l768d": (1, 32)})
    changes = {"checkpoint": str(tuned(tmp_path / "tuned.pth")), "dim": None, "depth": None}
    for _ in range(2):
        lines = "\n".join(begin(cohort, tmp_path / "out", **changes))
        assert "tuned.pth: took the prefix 'slide_encoder.' off" in lines
        assert "tuned.pth: found the head of a fine-tuned encoder" in lines
