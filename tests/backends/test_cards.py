"""The general kernels start on cards that are not here: they compile, and take no more shared memory than there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from compiled import words_of

# Each kernel of each kind, two or more on each architecture on which none has run, and one that takes much of little and of
# much shared memory. The program alone compiles all.
CASES = [
    "nest,forward,128,bfloat16,80",
    "nest,query,128,bfloat16,120",
    "nest,key_value,128,bfloat16,86",
    "nest,key_value,128,bfloat16,100",
    "stride,forward,64,bfloat16,86",
    "stride,query,64,bfloat16,90",
    "stride,key_value,256,bfloat16,89",
    "rows,forward,64,bfloat16,80",
    "rows,query,64,bfloat16,120",
    "rows,key_value,64,bfloat16,100",
    "nest,forward,64,bfloat16,89",
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


def test_every_card_of_the_page_is_compiled_for() -> None:
    page = (Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.split("## Which cards")[1].splitlines() if line.startswith("| ")][2:]
    on_page = {capability for row in rows for capability in re.findall(r"\d+\.\d", row[2])}
    tested = [f"{int(case.split(',')[4]) / 10:.1f}" for case in CASES]
    assert on_page == set(tested) == {"8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}
    assert min(tested.count(one) for one in on_page - {"9.0"}) >= 2
