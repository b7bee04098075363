"""The Hopper kernels compile with the installed Triton, whose Gluon changes with versions. They run in ``tests/gpu``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def has_gluon() -> bool:
    return importlib.util.find_spec("triton") is not None and bool(
        importlib.util.find_spec("triton.experimental.gluon")
    )


@pytest.mark.skipif(not has_gluon(), reason="needs a triton with Gluon")
def test_the_kernels_compile() -> None:
    cases = ["nest", "branch", "wide"]
    # By themselves: tests run in Triton's interpreter, which does not compile.
    done = subprocess.run(
        [sys.executable, str(HERE / "hopper_compile.py"), *cases],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [kernel, case] for kernel in ("forward", "key_value", "query") for case in cases
    ]
    assert all(int(products) > 0 and int(size) > 10_000 for _, _, products, size in rows)
