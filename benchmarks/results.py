"""Results: started, written, read and merged. One writer for every suite."""

from __future__ import annotations

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.cases import Record

SCHEMA = 1
_LISTS = ("speed", "memory", "gigapath", "growth", "curves", "longest", "stream")
_BY_CASE = ("speed", "memory", "gigapath")
_SAME = ("schema", "commit", "versions", "device", "limits", "judged", "pattern")


class NoResult(ValueError):
    """A file that is no result of this benchmark, or results that cannot be merged."""


def program(name: str, text: str | None, *, out_required: bool = False) -> argparse.ArgumentParser:
    """The options of ``python -m benchmarks.NAME``: ``--out``, and what the caller adds."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=(text or "").splitlines()[0])
    parser.add_argument("--out", type=a_file, required=out_required, help="where the result is written as JSON")
    return parser


def a_file(text: str) -> Path:
    """For argparse: said before anything is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected the name of a JSON file")
    return path


def started(commit: str | None = None, **fields: Any) -> Record:
    """The head of every result (date, commit, versions), followed by ``fields``."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": environment.commit(commit or os.environ.get("LONGNET_COMMIT")),
        "versions": environment.versions(),
        **fields,
    }


def save(result: Record, path: Path | None) -> None:
    """As JSON; a run killed meanwhile leaves the file as it was. Without a path nothing is written."""
    if path is None:
        return
    text, path = json.dumps(result, indent=1) + "\n", path.resolve()
    if path.exists() and not path.is_file():
        # A device or a pipe, /dev/null say: a file must not take its place.
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def load(path: Path) -> Record:
    """Raises :class:`NoResult` for a file that is missing or something else."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NoResult(f"{path}: {error}") from None
    # Results of one suite alone had no schema at first, but always a kind.
    if not isinstance(result, dict) or (result.get("schema") != SCHEMA and "kind" not in result):
        raise NoResult(f"{path} is no result of this benchmark: expected schema {SCHEMA}")
    return result


def continued(path: Path, started: Record) -> Record:
    """The result of a run that was cut short, to be gone on with.

    Raises:
        NoResult: it is of another kind, or of other sources, versions or another device than ``started``.
    """
    result = load(path)
    for name, field in (("kind", None), ("versions", None), ("device", "model"), ("commit", "sources")):
        found, now = (one.get(name) if field is None else one.get(name, {}).get(field) for one in (result, started))
        if found != now:
            raise NoResult(f"{path} has the {field or name} {found}, this run {now}: expected another --out")
    return result


def merge(results: dict[str, Record]) -> Record:
    """Sections, or cells of one, of several GPU runs as one result.

    Args:
        results: by the name to use in messages, usually a path. The first one's date is taken.

    Raises:
        NoResult: results that differ in commit, versions, device or limits, or that hold the same cell twice.
    """
    (first_name, first), *others = results.items()
    for name, result in results.items():
        if result.get("failed") is not None:
            raise NoResult(f"{name} is of a run that failed: {result['failed']}")
        if result["device"]["kind"] != "cuda":
            raise NoResult(f"{name} is a result of kind {result['device']['kind']!r}: only GPU results can be merged")
    for name, result in others:
        for key in _SAME:
            if result[key] != first[key]:
                raise NoResult(f"{first_name} and {name} differ in {key}: {first[key]} and {result[key]}")
    merged: Record = {**first, "dates": [result["date"] for result in results.values()]}
    peers: dict[str, Record] = {}
    checks: dict[str, Record] = {}
    for result in results.values():
        # One that was there in any of the runs says more than one that was not.
        for peer in result["peers"]:
            if peer["name"] not in peers or peers[peer["name"]]["why_not"] is not None:
                peers[peer["name"]] = peer
        checks |= {f"{check['what']} {check['error']}": check for check in result["checks"]}
    merged |= {"peers": list(peers.values()), "checks": list(checks.values())}
    merged["ceilings"] = next((result["ceilings"] for result in results.values() if result["ceilings"]), None)
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
