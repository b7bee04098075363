"""A probe in a fresh process: its argument and its record are JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.cases import Record
from benchmarks.checks import CheckFailed
from benchmarks.environment import ROOT, child_environment


def in_child(module: str, argument: Record, settings: Mapping[str, str] | None = None) -> Record:
    """What ``python -m module`` answers, whose main is :func:`serve`.

    Raises:
        CheckFailed: the result measured there is not the definition's.
        RuntimeError: the process died; the message has its last lines.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(argument)],
        cwd=ROOT,
        env={**child_environment(), **(settings or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        raise CheckFailed(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{module} {argument} ended with code {done.returncode}:\n{last}")
    record: Record = json.loads(done.stdout)
    return record


def serve(probe: Callable[[Any], Record]) -> None:
    """The child's side: the argument of the command line to a record on stdout."""
    try:
        record = probe(json.loads(sys.argv[1]))
    except CheckFailed as error:
        print(error, file=sys.stderr)
        raise SystemExit(3) from None
    print(json.dumps(record))
