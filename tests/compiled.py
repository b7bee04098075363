"""Programs that compile kernels for GPUs, by themselves: tests run in Triton's interpreter, which does not compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def words_of(program: Path, *arguments: str) -> list[list[str]]:
    """The words of every line that the program prints."""
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]
