"""Which files ``longnet slide-encode`` reads, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from longnet.slides.files import SLIDE_FORMATS
from longnet.slides.folders import HIDDEN, files_below, is_hidden, listed
from longnet.slides.patients import patient_rows

Result = TypeVar("Result")
_RESULTS = (".slide.safetensors", ".slide.png")
_WORKING = ".working"


class Job(NamedTuple):
    """What makes one result: a slide, or the slides of a patient.

    ``name`` is for messages, ``origins`` are lines of a table, ``fault`` says why it cannot be made.
    """

    name: str
    sources: tuple[Path, ...]
    target: Path
    origins: tuple[str, ...] = ()
    fault: str = ""

    @property
    def work_folder(self) -> Path:
        """There while a process makes the result, and locked by it."""
        return self.target.with_name(f"{self.target.name}{_WORKING}")

    def version(self) -> dict[str, str]:
        """Sizes and modification times, which tell whether a slide has changed."""
        states = [self.of_source(number, Path.stat) for number in range(len(self.sources))]
        return {
            "slide_bytes": ",".join(str(state.st_size) for state in states),
            "slide_modified": ",".join(str(state.st_mtime_ns) for state in states),
        }

    def of_source(self, number: int, read: Callable[[Path], Result]) -> Result:
        """What ``read`` gives for a slide; its errors name the table's line and the path."""
        source = self.sources[number]
        if self.fault:
            raise ValueError(self.fault)
        try:
            return read(source)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            text = text if text.startswith(str(source)) else f"{source}: {text}"
            raise ValueError(f"{self.origins[number]}: {text}" if self.origins else text) from error


PassedOver = Mapping[str, list[str]]
"""Names of files that are not encoded, by the reason."""


def find_jobs(slides: Path, out: Path | None, patients: Path | None) -> tuple[list[Job], PassedOver]:
    """The results to make.

    Args:
        slides: a slide, or a folder of them and of folders of them.
        out: the result, or the folder of results; None: beside the slides.
        patients: a table of the slides of each patient, whose paths are in the folder ``slides``.

    Raises:
        ValueError: no slide, an ``out`` that does not fit, or a table that is none. OSError: no such file.
    """
    if not slides.is_dir():
        if patients is not None:
            raise ValueError(f"--patients with {slides}: expected the folder that the table's paths are in")
        return [_one_slide(slides, out)], {}
    folder = slides if out is None else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: expected a folder, as {slides} is one")
    if patients is not None:
        return [
            Job(
                name,
                tuple(row.path for row in rows),
                folder / f"{name}{_RESULTS[0]}",
                tuple(f"{patients}, line {row.line}" for row in rows),
            )
            for name, rows in patient_rows(patients, slides).items()
        ], {}
    passed_over: dict[str, list[str]] = {}

    def refuse(error: OSError) -> None:
        passed_over.setdefault(f"a folder that cannot be read ({error.strerror})", []).append(str(error.filename))

    paths = [path for path in files_below(slides, refuse) if not path.parent.name.endswith(f".safetensors{_WORKING}")]
    targets: dict[Path, list[Path]] = {}
    own = {f"{path.parent / path.stem}{ending}" for path in paths for ending in _RESULTS if not _skip_reason(path)}
    for path in paths:
        if not (reason := _skip_reason(path)):
            target = folder / path.parent / f"{path.stem}{_RESULTS[0]}"
            targets.setdefault(target, []).append(path)
        elif str(path) not in own:
            passed_over.setdefault(reason, []).append(str(path))
    if not targets:
        others = "".join(f"; {reason}: {listed(names)}" for reason, names in passed_over.items())
        raise ValueError(f"{slides} holds no slide: expected files ending in {', '.join(SLIDE_FORMATS)}{others}")
    jobs = []
    for target, (first, *rivals) in targets.items():
        names = ", ".join(str(slides / path) for path in (first, *rivals))
        fault = f"{names}: several files of one slide's name; expected one of them" if rivals else ""
        jobs.append(Job(str(first), (slides / first,), target, fault=fault))
    return jobs, passed_over


def _one_slide(slide: Path, out: Path | None) -> Job:
    if not slide.is_file():
        raise FileNotFoundError(f"{slide} is neither a file nor a folder")
    target = slide.with_name(f"{slide.stem}{_RESULTS[0]}") if out is None else out
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {target}: expected a name ending in .safetensors")
    if target.absolute() == slide.absolute():
        raise ValueError(f"--out {target} is the slide itself: expected another file")
    return Job(slide.name, (slide,), target)


def _skip_reason(path: Path) -> str:
    """Why a file of a folder is not encoded; empty for a slide."""
    if is_hidden(path):
        return HIDDEN
    if path.name.endswith(_RESULTS):
        return "a result by its name"
    return "" if path.suffix.lower() in SLIDE_FORMATS else f"not one of {', '.join(SLIDE_FORMATS)}"
