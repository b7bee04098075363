"""One quick run of the GPU benchmark, for every test that reads a result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_tools import measure


@pytest.fixture(scope="session")
def quick_gpu_run() -> dict[str, Any]:
    return measure()
