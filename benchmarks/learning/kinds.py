"""Kinds of values of the learning programs' options, and the names of their files."""

from __future__ import annotations

import argparse
import math
import re
from contextlib import suppress
from pathlib import Path


def file_name(stack: str) -> str:
    """A stack's name as its files and folders have it."""
    return re.sub(r", |[+ /]", "_", stack)


def seeds(text: str) -> list[int]:
    found = [seed.strip() for seed in text.split(",")]
    if not all(map(str.isdecimal, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers by commas, as in 0,1,2")
    return list(map(int, found))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


def above(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")


def run(text: str) -> Path:
    if not (Path(text) / "run.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no run: expected a folder runs/NAME below an --out")
    return Path(text)


def existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text)
