"""Tensors that are made once. What graphs ask of them: ``tests/gpu``."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import longnet
from longnet.runtime.cache import GraphSafeCache, tensor_cache

CPU = torch.device("cpu")


def test_a_key_is_made_once_and_the_last_asked_for_stay():
    made: list[int] = []

    def ask(kept: GraphSafeCache, key: int) -> float:
        return float(kept.get(key, CPU, lambda: made.append(key) or torch.tensor(float(key))))  # type: ignore[func-returns-value]

    kept = GraphSafeCache(2)
    assert [ask(kept, key) for key in (1, 2, 1, 3, 1, 2)] == [1.0, 2.0, 1.0, 3.0, 1.0, 2.0]
    # 2 was the one asked for longest ago when 3 came.
    assert made == [1, 2, 3, 2]


def test_nothing_fake_is_kept():
    kept = GraphSafeCache(2)
    make = lambda: torch.arange(3)  # noqa: E731
    for _ in range(2):
        with FakeTensorMode():
            assert type(kept.get(0, CPU, make)) is not torch.Tensor
        assert kept.get(0, CPU, make).tolist() == [0, 1, 2]
    assert kept.get(0, CPU, make) is kept.get(0, CPU, make)


def test_functions_are_cached_while_nothing_is_traced():
    made = []

    @tensor_cache(2)
    def twice(number: int) -> tuple[torch.Tensor]:
        made.append(number)
        return (torch.tensor(2 * number),)

    assert twice(1) is twice(1) and made == [1]
    with FakeTensorMode(), FlopCounterMode(display=False):
        assert type(twice(1)[0]) is not torch.Tensor
    with FlopCounterMode(display=False):
        assert twice(1)[0].tolist() == 2
    assert made == [1, 1]
    torch.func.functionalize(lambda: twice(3)[0])()
    twice(3)
    assert made == [1, 1, 3, 3]


def test_no_other_cache_holds_tensors():
    """``functools`` caches what it is given, fake tensors too: functions that give tensors have ``tensor_cache``."""
    found = []
    for path in sorted(Path(longnet.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None and "Tensor" in ast.unparse(node.returns):
                caches = [ast.unparse(one).partition("(")[0] for one in node.decorator_list]
                found += [f"{path.name}: {node.name}" for one in caches if one.split(".")[-1] in ("cache", "lru_cache")]
    assert found == []
