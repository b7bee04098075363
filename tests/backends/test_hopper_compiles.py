"""The Hopper kernels compile with the installed Triton, whose Gluon changes with versions. They run in ``tests/gpu``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from compiled import words_of

HERE = Path(__file__).parent


def has_gluon() -> bool:
    return importlib.util.find_spec("triton") is not None and bool(
        importlib.util.find_spec("triton.experimental.gluon")
    )


@pytest.mark.skipif(not has_gluon(), reason="needs a triton with Gluon")
def test_the_kernels_compile() -> None:
    cases = ["nest", "branch", "wide", "window", "stride", "blocks", "padded-nest", "padded-wide", "padded-stride"]
    rows = words_of(HERE / "hopper_compile.py", *cases)
    assert [row[:2] for row in rows] == [
        [kernel, case] for kernel in ("forward", "key_value", "query") for case in cases
    ]
    assert all(int(products) > 0 and int(size) > 10_000 for _, _, products, size in rows)
