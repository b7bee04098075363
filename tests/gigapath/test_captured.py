"""The bookkeeping of captured passes without a GPU: a graph that replays nothing gives what it was captured with."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longnet.gigapath.captured import Replays


class NoGraph:
    def replay(self) -> None: ...

    def pool(self) -> None: ...


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    stream = lambda *_: SimpleNamespace(wait_stream=lambda other: None)  # noqa: E731
    for name, fake in {
        "CUDAGraph": NoGraph, "graph": nothing, "stream": nothing, "device": nothing, "Stream": stream, "current_stream": stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.used = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def run(model: Model, x: Tensor) -> list[Tensor]:
    hidden = model.frozen(model.used(x)).tanh()
    return [hidden.sum(1), hidden.square()]


def call(replays: Replays, model: Model, x: Tensor, settings: Any = None) -> list[Tensor]:
    return replays.run(model, settings, lambda x: run(model, x), x)


def test_results_and_gradients_are_copies_and_go_to_their_inputs() -> None:
    torch.manual_seed(0)
    model, replays, x = Model(), Replays(), torch.randn(2, 4, requires_grad=True)
    wanted = [x, *model.used.parameters()]
    outs = run(model, x)
    towards = [torch.zeros_like(out) for out in outs]
    expected = torch.autograd.grad(outs, wanted, towards)
    for _ in range(2):
        found = call(replays, model, x)
        for got, want in zip(found, outs, strict=True):
            assert torch.equal(got, want) and got.requires_grad
        # A graph that replays nothing knows the gradient of its capture alone.
        torch.autograd.backward(found, towards)
        for one, want in zip(wanted, expected, strict=True):
            assert one.grad is not None and torch.equal(one.grad, want)
    (captured,) = replays._by_model[model].values()
    memory = {one.untyped_storage().data_ptr() for one in (*captured._outs, *captured._grads)}
    given = [*found, *(one.grad for one in wanted if one.grad is not None)]
    assert not memory & {one.untyped_storage().data_ptr() for one in given}
    assert all(one.grad is None for one in (*model.unused.parameters(), *model.frozen.parameters()))


def test_a_result_without_a_gradient() -> None:
    model, replays, x = Model(), Replays(), torch.randn(2, 4)
    function = lambda x: [x * 3, model.used(x), model.frozen(x)]  # noqa: E731
    for _ in range(2):
        first, second, third = replays.run(model, None, function, x)
        assert not first.requires_grad and second.requires_grad and not third.requires_grad
        assert torch.equal(first, x * 3) and torch.equal(third, model.frozen(x))
        second.sum().backward()


def test_a_size_that_waits_for_its_backward_pass_is_not_replayed() -> None:
    model, replays, x = Model(), Replays(), torch.randn(2, 4)
    first = call(replays, model, x)[0]
    (captured,) = replays._by_model[model].values()
    assert captured.waiting and "_Replay" in type(first.grad_fn).__name__
    second = call(replays, model, x)[0]
    assert "_Replay" not in type(second.grad_fn).__name__
    first.sum().backward(retain_graph=True)
    assert not captured.waiting
    with pytest.raises(RuntimeError, match="ran twice"):
        first.sum().backward()
    dropped = call(replays, model, x)
    assert captured.waiting
    del dropped
    gc.collect()
    assert not captured.waiting


def test_what_a_graph_depends_on_has_graphs_of_its_own() -> None:
    model, replays, x = Model(), Replays(), torch.randn(2, 4)

    def count() -> int:
        return len(replays._by_model[model])

    call(replays, model, x)
    call(replays, model, torch.randn(2, 4))
    assert count() == 1
    for again in range(2):
        call(replays, model, torch.randn(3, 4))
        with torch.no_grad():
            assert not call(replays, model, x)[0].requires_grad
        call(replays, model, x, settings="others")
        assert count() == 4, again
    model.used.weight = nn.Parameter(torch.randn(4, 4))
    call(replays, model, x)
    assert count() == 5
    for rows in range(4, 20):
        call(replays, model, torch.randn(rows, 4))
    assert count() == 8
    replays.forget(model)
    assert model not in replays._by_model


def test_parameters_are_as_before_after_a_capture() -> None:
    model, replays = Model(), Replays()
    model.again = model.used
    before = dict(model.named_parameters(remove_duplicate=False))
    seen: list[list[nn.Parameter]] = []

    def function(x: Tensor) -> list[Tensor]:
        seen.append(list(model.parameters()))
        return run(model, x)

    replays.run(model, None, function, torch.randn(2, 4))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is one for name, one in before.items()) and after.keys() == before.keys()
    for some in seen:
        for other, own in zip(some, model.parameters(), strict=True):
            assert other is not own and other.data_ptr() == own.data_ptr() and other.requires_grad == own.requires_grad

    def fails(x: Tensor) -> list[Tensor]:
        raise MemoryError

    with pytest.raises(MemoryError):
        replays.run(model, "other", fails, torch.randn(2, 4))
    assert all(after[name] is one for name, one in model.named_parameters(remove_duplicate=False))
    assert len(replays._by_model[model]) == 1


def test_a_model_is_not_kept_alive() -> None:
    replays = Replays()

    def once() -> None:
        model = Model().eval()
        with torch.no_grad():
            replays.run(model, None, lambda x: [x * 2], torch.randn(2, 4))
        assert len(replays._by_model) == 1

    once()
    gc.collect()
    assert len(replays._by_model) == 0
