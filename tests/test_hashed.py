"""A hash that is computed once: the same as before, and of this process alone."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace

from longnet.geometry import Pattern
from longnet.hashed import hash_once

hashed = []


@dataclass(frozen=True)
class Inner:
    value: int

    def __hash__(self) -> int:
        hashed.append(self.value)
        return self.value


@hash_once
@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "a"


def test_it_is_computed_once_for_each_object():
    hashed.clear()
    one = Outer(Inner(3))
    assert hash(one) == hash(one) == hash(Outer(Inner(3)))
    assert len(hashed) == 2
    assert one == Outer(Inner(3)) and len({one, Outer(Inner(3)), Outer(Inner(4))}) == 2


def test_a_changed_copy_has_its_own():
    one = Outer(Inner(3))
    hash(one)
    assert hash(replace(one, inner=Inner(4))) == hash(Outer(Inner(4))) != hash(one)


def test_it_is_neither_pickled_nor_copied():
    # Another process hashes text to other numbers.
    pattern = Pattern.parse((16, 32), (1, 2))
    hash(pattern)
    for other in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern), copy.copy(pattern)):
        assert "_hash" not in vars(other)
        assert other == pattern
        assert hash(other) == hash(pattern)
