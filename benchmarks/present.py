"""Results of every kind, read, written, merged and printed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import report, stream_record, verdicts
from benchmarks.gpu import report as gpu_report
from benchmarks.runner import SCHEMA
from benchmarks.tables import Table
from benchmarks.verdicts import Result

_LISTS = ("speed", "memory", "gigapath", "growth", "curves", "longest", "stream")
_BY_CASE = ("speed", "memory", "gigapath")
_SAME = ("schema", "commit", "versions", "device", "limits", "judged", "pattern")


class NoResult(ValueError):
    """A file that is no result of this benchmark, or results that cannot be merged."""


def load(path: Path) -> Result:
    """Raises :class:`NoResult` for a file that is missing or something else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NoResult(f"{path}: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise NoResult(f"{path} is no result of this benchmark: expected schema {SCHEMA}")
    return result


def save(result: Result, path: Path) -> None:
    """As JSON; a run killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def _maker(result: Result) -> ModuleType:
    if result.get("kind") == stream_record.KIND:
        return stream_record
    return gpu_report if result["device"]["kind"] == "cuda" else report


def header(result: Result) -> str:
    return str(_maker(result).header(result))


def tables(result: Result) -> list[Table]:
    found: list[Table] = _maker(result).tables(result)
    return found


def summary(result: Result) -> Iterator[str]:
    maker = _maker(result)
    lines = verdicts.summary(result) if maker is report else maker.summary(result)
    yield from lines


def markdown(result: Result) -> str:
    """Everything that was measured, for a page."""
    parts = [header(result)]
    for table in tables(result):
        parts += [f"**{table.title}**", table.markdown(), *table.notes]
    return "\n\n".join([*parts, *summary(result)])


def plain(result: Result) -> str:
    """Everything that was measured, for a terminal or a log."""
    return "\n\n".join([header(result), *(table.plain() for table in tables(result)), "\n".join(summary(result))])


def merge(results: dict[str, Result]) -> Result:
    """Sections, or cells of one, of several GPU runs as one result.

    Args:
        results: by the name to use in messages, usually a path. The first one's date is kept.

    Raises:
        NoResult: results that differ in commit, versions, device or limits, or that hold the same cell twice.
    """
    (first_name, first), *others = results.items()
    for name, result in results.items():
        if result["device"]["kind"] != "cuda":
            raise NoResult(f"{name} is a result of kind {result['device']['kind']!r}: only GPU results can be merged")
    for name, result in others:
        for key in _SAME:
            if result[key] != first[key]:
                raise NoResult(f"{first_name} and {name} differ in {key}: {first[key]} and {result[key]}")
    merged: Result = {**first, "dates": [result["date"] for result in results.values()]}
    peers: dict[str, dict[str, Any]] = {}
    checks: dict[str, dict[str, Any]] = {}
    for result in results.values():
        # One that was there in any of the runs says more than one that was not.
        for peer in result["peers"]:
            if peer["name"] not in peers or peers[peer["name"]]["why_not"] is not None:
                peers[peer["name"]] = peer
        checks |= {f"{check['what']} {check['error']}": check for check in result["checks"]}
    merged["peers"], merged["checks"] = list(peers.values()), list(checks.values())
    have = [name for name, result in results.items() if result["ceilings"]]
    merged["ceilings"] = results[have[0]]["ceilings"] if have else None
    for section in _LISTS:
        merged[section] = []
        seen: dict[str, str] = {}
        for name, result in results.items():
            for record in result.get(section, []):
                cell = [record["case"], record["pass"]] if section in _BY_CASE else [record["pass"]]
                key = json.dumps(cell)
                if key in seen:
                    raise NoResult(f"{seen[key]} and {name} both hold the cell {key} of {section}")
                seen[key] = name
                merged[section].append(record)
    # As in a run of its own, whatever the order of the parts.
    merged["speed"].sort(key=lambda record: (record["case"]["length"], record["case"]["head_dim"]))
    return merged
