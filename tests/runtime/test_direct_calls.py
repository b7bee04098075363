"""Modes, profilers, subclasses and transforms see the operators; other calls skip torch's dispatcher. Both give the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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


class Unseen(nullcontext):
    """Where nothing sees the operators: they are called without the dispatcher."""


needs = st.lists(st.booleans(), min_size=3, max_size=3).filter(any)


@given(
    needed=needs, of_out=st.booleans(), of_lse=st.booleans(), key_heads=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
def test_both_ways_give_the_same_gradients(needed, of_out, of_lse, key_heads, seed) -> None:
    """Whichever inputs need one, and whichever outputs are used; the others get none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    made = [torch.randn(1, heads, 24, 8, generator=generator) for heads in (2, key_heads, key_heads)]
    weights = torch.randn(1, 2, 24, 8, generator=generator), torch.randn(1, 2, 24, generator=generator)
    for way in (Unseen, Seen):
        tensors = [x.clone().requires_grad_(need) for x, need in zip(made, needed, strict=True)]
        with way():
            out, lse = dilated_attention(*tensors, *CALL, is_causal=True, return_lse=True, backend="portable")
            used = [x * weight for x, weight, use in zip((out, lse), weights, (of_out, of_lse), strict=True) if use]
            if used:
                sum(x.sum() for x in used).backward(retain_graph=True)
                # The graph is still there.
                torch.autograd.grad(used[0].sum(), [x for x in tensors if x.requires_grad], allow_unused=True)
        assert [x.grad is not None for x in tensors] == [need and bool(used) for need in needed]
        found.append([out, lse, *(x.grad for x in tensors if x.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_calls_have_the_same_gradients(inputs, use_reentrant) -> None:
    call = lambda *tensors: dilated_attention(*tensors, *CALL, backend="portable")  # noqa: E731
    expected = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    checkpoint(call, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    for x, other in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, other)


def test_a_gradient_of_a_gradient_is_refused(inputs) -> None:
    out = dilated_attention(*inputs, *CALL, backend="portable")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_threads_have_gradients_of_their_own(inputs) -> None:
    def gradients(scale):
        out = dilated_attention(*inputs, *CALL, scale=scale, backend="portable")
        return torch.autograd.grad(out.square().sum(), inputs)

    scales = [0.1, 0.2, 0.3, 0.4] * 4
    with ThreadPoolExecutor(4) as pool:
        for scale, found in zip(scales, pool.map(gradients, scales), strict=True):
            for one, other in zip(found, gradients(scale), strict=True):
                assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_anomaly_detection_names_the_call(inputs) -> None:
    with torch.autograd.detect_anomaly():
        out = dilated_attention(*inputs, *CALL, backend="portable")
        with (
            pytest.warns(UserWarning, match="Error detected in portableBackward"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            out.backward(torch.full_like(out, torch.nan))


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
