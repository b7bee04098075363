"""Modes, profilers, subclasses and transforms see the operators; other calls skip torch's dispatcher. Both give the same."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet import dilated_attention
from longnet.attention.call import AttentionSpec
from longnet.geometry import Pattern
from longnet.runtime import operators

CALL = ((8, 16), (1, 2))


class Seen(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorded(torch.Tensor):
    """A subclass that notes the operators it meets."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def inputs():
    return [torch.randn(1, 2, 24, 8, requires_grad=True) for _ in range(3)]


def of_ours(names):
    return [name for name in names if name.startswith("longnet.")]


def test_only_a_mode_makes_a_call_go_through_the_dispatcher(inputs, monkeypatch) -> None:
    ran = []
    real = torch.ops.longnet.portable.default

    def run(*arguments):
        ran.append(True)
        return real(*arguments)

    # A pair of its own: those of the library were made before.
    call = operators.caller_of("portable", real, run, lambda ctx, inputs, output: None, lambda *_: None)
    flat = (*(x.detach() for x in inputs), None, None, None)
    spec = AttentionSpec(Pattern.parse(*CALL), False, 0.3).encode()
    expected = real(*flat, *spec)
    for found, other in zip(call(*flat, *spec), expected, strict=True):
        assert torch.equal(found, other)
    assert ran == [True]
    with Seen() as seen:
        call(*flat, *spec)
    assert ran == [True] and of_ours(seen.names) == ["longnet.portable.default"]


@pytest.mark.parametrize("backend", ["portable", "cpu_flash"])
def test_gradients_are_those_of_the_operator(inputs, backend) -> None:
    grad = torch.randn(1, 2, 24, 8)

    def gradients():
        out = dilated_attention(*inputs, *CALL, is_causal=True, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    direct = gradients()
    with Seen() as seen:
        observed = gradients()
    assert of_ours(seen.names) == [f"longnet.{backend}.default", f"longnet.{backend}_backward.default"]
    for found, other in zip(direct, observed, strict=True):
        assert torch.equal(found, other)


def test_a_mode_around_the_backward_pass_alone_sees_it(inputs) -> None:
    out = dilated_attention(*inputs, *CALL, backend="portable")
    with Seen() as seen:
        out.sum().backward()
    assert of_ours(seen.names) == ["longnet.portable_backward.default"]


def test_the_profiler_sees_both_operators(inputs) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dilated_attention(*inputs, *CALL, backend="portable").sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"longnet::portable", "longnet::portable_backward"} <= names


def test_a_subclass_sees_the_operator(inputs) -> None:
    Recorded.names = []
    query = inputs[0].detach().as_subclass(Recorded)
    dilated_attention(query, *(x.detach() for x in inputs[1:]), *CALL, backend="portable")
    assert of_ours(Recorded.names) == ["longnet.portable.default"]


def test_meta_tensors_get_shapes(inputs) -> None:
    out, lse = dilated_attention(*(x.detach().to("meta") for x in inputs), *CALL, return_lse=True, backend="portable")
    assert out.is_meta and out.shape == (1, 2, 24, 8) and lse.shape == (1, 2, 24)


def test_saved_tensor_hooks_are_called(inputs) -> None:
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        out = dilated_attention(*inputs, *CALL, backend="portable")
    assert packed.count(inputs[0].shape) == 4
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_what_was_written_to_is_told(inputs) -> None:
    changed = inputs[0] * 1
    out = dilated_attention(changed, *inputs[1:], *CALL, backend="portable")
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
