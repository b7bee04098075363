"""The general kernels start on cards that are not here: they compile, and take no more shared memory than there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from compiled import words_of

# Each kernel of each kind; of those that take most, one on each architecture. The program alone compiles all.
CASES = [
    "nest,forward,128,bfloat16,80",
    "nest,query,128,bfloat16,120",
    "nest,key_value,128,bfloat16,86",
    "nest,key_value,128,bfloat16,100",
    "stride,forward,64,bfloat16,90",
    "stride,query,64,bfloat16,90",
    "stride,key_value,256,bfloat16,89",
    "rows,forward,64,bfloat16,80",
    "rows,query,64,bfloat16,80",
    "rows,key_value,64,bfloat16,80",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_and_fit_into_the_shared_memory_of_every_card() -> None:
    rows = words_of(Path(__file__).parent / "card_compile.py", *CASES)
    assert [",".join(row[:5]) for row in rows] == CASES
    assert [row for row in rows if int(row[5]) > int(row[6])] == []
    assert all(int(row[7]) > 0 for row in rows)
    # Where there is more, blocks are larger.
    small, large = (int(row[5]) for row in rows if row[:3] == ["nest", "key_value", "128"])
    assert small < large
