"""Tensors that are made once. What graphs ask of them: ``tests/gpu``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import longnet
from longnet.runtime import cache
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


class Stream(SimpleNamespace):
    """A stream of a GPU: which events it waited for."""

    def __init__(self, handle: int) -> None:
        super().__init__(cuda_stream=handle, waited=[])

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class Gpu:
    """torch's side of two GPUs, in place of a machine with them: streams, captures and who waited for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.capturing, self.switched = 0, False, 0
        self.streams = {0: Stream(1), 1: Stream(2)}
        self.events: list[SimpleNamespace] = []
        self.made: list[SimpleNamespace] = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.streams[self.device])
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(cache, "current_stream_handle", lambda device: self.streams[device].cuda_stream)
        monkeypatch.setattr(cache, "_elsewhere", self.elsewhere)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.switched += 1
        before, self.device = self.device, device.index
        yield
        self.device = before

    def make(self) -> SimpleNamespace:
        read: list[Stream] = []
        self.made.append(SimpleNamespace(read=read, record_stream=read.append))
        return self.made[-1]

    def elsewhere(self, make: Callable[[], SimpleNamespace]) -> object:
        event = SimpleNamespace(past=False)
        event.query = lambda: event.past
        self.events.append(event)
        return cache._Made(make(), event)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


FIRST, SECOND = (torch.device("cuda", number) for number in range(2))


def test_every_stream_waits_until_a_tensor_is_there(gpu: Gpu) -> None:
    kept, main, other = GraphSafeCache(2), gpu.streams[0], Stream(3)
    tensor = kept.get("a", FIRST, gpu.make)
    (event,) = gpu.events
    gpu.streams[0] = other
    assert kept.get("a", FIRST, gpu.make) is tensor
    # Nobody knows that it is there: who asks again waits again.
    assert kept.get("a", FIRST, gpu.make) is tensor
    assert main.waited == [event] and other.waited == [event, event]
    event.past = True
    late = gpu.streams[0] = Stream(4)
    assert kept.get("a", FIRST, gpu.make) is tensor and late.waited == []
    # Given up, its memory waits for all of them.
    assert {stream.cuda_stream for stream in tensor.read} == {1, 3, 4}


def test_a_stream_that_read_a_tensor_is_asked_for_nothing_more(gpu: Gpu) -> None:
    kept = GraphSafeCache(2)
    tensor = kept.get("a", FIRST, gpu.make)
    gpu.events[0].past = True
    kept.get("a", FIRST, gpu.make)
    before = len(tensor.read), gpu.switched
    assert all(kept.get("a", FIRST, gpu.make) is tensor for _ in range(3))
    assert (len(tensor.read), gpu.switched) == before
    # Another device's stream of the same number is another stream.
    gpu.streams[1] = Stream(1)
    assert kept.get("b", SECOND, gpu.make) is gpu.made[1] and gpu.made[1].read == [gpu.streams[1]]


def test_a_captured_tensor_is_never_given_up(gpu: Gpu) -> None:
    kept = GraphSafeCache(1)
    tensor = kept.get("a", FIRST, gpu.make)
    gpu.events[0].past = True
    kept.get("a", FIRST, gpu.make)
    # On the stream that read it before.
    gpu.capturing = True
    assert kept.get("a", FIRST, gpu.make) is tensor
    # What is made in a capture is made by the graph.
    assert kept.get("b", FIRST, gpu.make) is not kept.get("b", FIRST, gpu.make)
    gpu.capturing = False
    kept.get("c", FIRST, gpu.make)
    assert kept.get("a", FIRST, gpu.make) is tensor
    assert list(kept._made) == ["c"]


def test_tensors_asked_for_without_waiting_count_as_asked_for(gpu: Gpu) -> None:
    kept = GraphSafeCache(2)
    first = kept.get("a", FIRST, gpu.make)
    gpu.events[0].past = True
    kept.get("a", FIRST, gpu.make)
    kept.get("b", FIRST, gpu.make)
    assert kept.get("a", FIRST, gpu.make) is first
    kept.get("c", FIRST, gpu.make)
    assert set(kept._made) == {"a", "c"}


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
