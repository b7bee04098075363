"""A run: suites and their cells become steps, and steps one result that can be written after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compiling, environment, results
from benchmarks.cases import BASES, Call, Case, Record
from benchmarks.device import Device, load_average, no_peak_reason
from benchmarks.peers import load_alexisrozhkov, load_dilated_attention_pytorch, load_torchscale
from benchmarks.run import EFFORTS, Run, Suite
from benchmarks.suites import growth, machine, memory, speed, stream

SUITES: tuple[Suite, ...] = (
    machine.CHECKS, machine.NOISE, machine.CEILINGS, speed.SUITE, memory.SUITE, machine.IMPORT, speed.GIGAPATH_SUITE,
    growth.SUITE, growth.CURVES_SUITE, memory.LONGEST, stream.SUITE,
)  # fmt: skip
# Part of every run, or of a run that has another section.
_ALONG = ("checks", "curves")
Cells = dict[str, tuple[Any, ...]]


class Step(NamedTuple):
    """A part of the run: ``run`` adds its records to the result."""

    label: str
    run: Callable[[], None]


def suites(kind: str) -> dict[str, Suite]:
    """Those of a kind of device, by name."""
    return {suite.name: suite for suite in SUITES if kind in suite.cells}


def sections(kind: str) -> tuple[str, ...]:
    return tuple(name for name in suites(kind) if name not in _ALONG)


def limits(kind: str) -> dict[str, Any]:
    return {name: limit for suite in SUITES for name, limit in suite.limits.get(kind, {}).items()}


def cells(scale: str, chosen: Iterable[str] | None = None) -> Cells:
    """What is measured at a scale (``cpu``, ``cuda``, each also with ``-quick``): of all sections, or of the chosen ones.

    Raises:
        ValueError: there is no such section.
    """
    kind = scale.removesuffix("-quick")
    names = set(sections(kind) if chosen is None else chosen)
    if unknown := names - set(sections(kind)):
        raise ValueError(f"section={unknown.pop()!r} is unknown: expected some of {sections(kind)}")
    names |= {"checks"} | ({"curves"} if "growth" in names else set())
    return {name: suite.cells[scale] for name, suite in suites(kind).items() if name in names}


def at_lengths(chosen: Cells, lengths: list[int] | None) -> Cells:
    """Speed, memory and noise of a CPU at these lengths instead, if there are any.

    Raises:
        ValueError: a length below one block of the kernel.
    """

    def at(cell: Any, length: int) -> Any:
        if isinstance(cell, Call):
            return Call(at(cell.case, length), cell.which)
        if length < cell.block:
            raise ValueError(f"--length {length} is below {cell.block}, one block of the kernel")
        return replace(cell, length=length)

    def change(name: str, every: tuple[Any, ...]) -> tuple[Any, ...]:
        if not lengths or name not in ("noise", "speed", "memory"):
            return every
        sizes = [min(lengths)] if name == "noise" else lengths
        return tuple(dict.fromkeys(at(cell, length) for length in sizes for cell in every))

    return {name: change(name, every) for name, every in chosen.items()}


def of_dtypes(chosen: Cells, dtypes: list[str] | None) -> Cells:
    """The cells of these dtypes, if there are any, and those that have none."""
    fits = lambda cell: not dtypes or all(case.dtype in dtypes for case in _cases(cell))  # noqa: E731
    return {name: tuple(filter(fits, every)) for name, every in chosen.items()}


def only(chosen: Cells, scale: str, lengths: list[int] | None, dims: list[int] | None) -> Cells:
    """The speed cells of these lengths and head dimensions.

    Raises:
        ValueError: there are none.
    """
    every: tuple[Case, ...] = speed.CELLS[scale]
    left = tuple(x for x in every if (not lengths or x.length in lengths) and (not dims or x.head_dim in dims))
    if not left:
        have = sorted({case.length for case in every}), sorted({case.head_dim for case in every})
        raise ValueError(
            f"length={lengths} and head_dim={dims} leave no cell: expected some of {have[0]} and {have[1]}"
        )
    return chosen | {"speed": left} if "speed" in chosen else chosen


def kernel_cases(cells: Cells) -> list[Case]:
    """Every different call of attention of these cells."""
    return list(dict.fromkeys(case for every in cells.values() for cell in every for case in _cases(cell)))


def _cases(cell: Any) -> tuple[Case, ...]:
    return getattr(cell, "cases", ())


def new_run(device: Device, scale: str, chosen: Cells, commit: str | None = None) -> Run:
    """A run with an empty result. Raises ValueError where git names another commit."""
    base, effort = BASES[scale], EFFORTS[scale]
    result = results.started(commit)
    result["versions"] |= environment.gpu_versions() if device.kind == "cuda" else {}
    pattern = {"segment_lengths": list(base.segment_lengths), "dilation_rates": list(base.dilation_rates)}
    result |= {"device": device.describe(), "limits": limits(device.kind), "judged": effort.judged, "pattern": pattern}
    result |= {"peers": []} | {name: None if one.single else [] for name, one in suites(device.kind).items()}
    if device.kind == "cpu":
        reason = no_peak_reason() if {"memory", "stream"} & set(chosen) else None
        result["memory_why_not"] = reason
        chosen = {name: every for name, every in chosen.items() if reason is None or name not in ("memory", "stream")}
    return Run(device, effort, chosen, result=result)


def steps(run: Run, **checkouts: Path | None) -> list[Step]:
    """Kernels first, then the definition: a wrong result ends the run before anything is timed.

    Args:
        checkouts: where other implementations lie, see :func:`_load`.
    """
    on_gpu, planned = run.device.kind == "cuda", []
    if on_gpu:
        planned.append(Step("compiling kernels", lambda: compile_all(run)))
    for name, suite in suites(run.device.kind).items():
        for cell in run.cells.get(name, ()):
            label = getattr(cell, "label", "")
            planned.append(Step(f"{name}: {label}" if label else name, partial(_measure, run, suite, cell)))
        if name == "checks":
            planned.append(Step("loading other implementations", partial(_load, run, **checkouts)))
    if not on_gpu:
        planned.append(Step("done", lambda: run.result["device"].update(load_average_after=load_average())))
    return planned


def compile_all(run: Run) -> None:
    compiling.compile_kernels(kernel_cases(run.cells), run.device.describe()["memory_bytes"])


def _measure(run: Run, suite: Suite, cell: Any) -> None:
    records: Record | list[Record] = suite.measure(run, cell)
    if suite.single:
        run.result[suite.name] = records
    else:
        run.result[suite.name].extend(records if isinstance(records, list) else [records])
    run.device.release()


def _load(
    run: Run,
    torchscale: Path | None = None,
    dilated_attention_pytorch: Path | None = None,
    alexisrozhkov: Path | None = None,
) -> None:
    base = BASES[run.device.kind if run.effort.judged else f"{run.device.kind}-quick"]
    run.peers = [load_torchscale(torchscale, base, run.device.device)]
    if run.device.kind == "cuda":
        run.peers.append(load_dilated_attention_pytorch(dilated_attention_pytorch))
        run.peers.append(load_alexisrozhkov(alexisrozhkov))
    run.result["peers"] = [peer.to_dict() for peer in run.peers]
