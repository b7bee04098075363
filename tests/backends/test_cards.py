"""The general kernels start on cards that are not here: they compile, and take no more shared memory than there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from compiled import words_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# Of those that take most, one for each architecture. `python tests/backends/card_compile.py` compiles all.
CASES = [
    "band,query,128,bfloat16,80",
    "nest,key_value,128,bfloat16,86",
    "band,key_value,256,bfloat16,89",
    "nest,key_value,128,bfloat16,100",
    "nest,query,128,bfloat16,120",
]


def test_kernels_fit_into_the_shared_memory_of_every_card() -> None:
    rows = words_of(Path(__file__).parent / "card_compile.py", *CASES)
    assert [",".join(row[:5]) for row in rows] == CASES
    assert [row for row in rows if int(row[5]) > int(row[6])] == []
    # Where there is more, blocks are larger.
    small = int(rows[1][5])
    assert [int(row[5]) > small for row in rows if row[:3] == ["nest", "key_value", "128"]] == [False, True]
