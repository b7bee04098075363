"""Compares what Triton's launcher and longnet give the C function that launches. Run by ``test_launcher``."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from fake_cuda import Driver
from triton import knobs
from triton.compiler.compiler import LazyDict
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.knobs import HookChain

from longnet.runtime import launcher_internals
from longnet.runtime.tma import view_of
from longnet.runtime.triton_internals import Launch, Value, descriptors


class Sizes(NamedTuple):
    length: int
    heads: int


@gluon.jit
def with_inputs(out, none, q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, sizes, nothing, scale, c: gl.constexpr):
    pass


@gluon.jit
def with_pointers(out, tensors, sizes, c: gl.constexpr):
    pass


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def plain(argument: Any) -> Any:
    """Addresses in place of tensors: the C function asks for the one or the other."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, list | tuple):
        return tuple(map(plain, argument))
    return argument


def same(call: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    # Hooks may be None, or a chain of none; what they would be told may be there or not.
    hooks = (HookChain, LazyDict)
    return plain(call) == tuple(None if isinstance(one, hooks) else one for one in plain(other))


if __name__ == "__main__":
    fake = Driver()
    fake.activate()
    launched = fake.launched.calls
    x, y, z = (torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16) for _ in range(3))
    out = torch.zeros(16)
    view = view_of(x)
    assert view is not None
    templates = (descriptors(view, x.dtype, 64, (1, 2, 4), 128), descriptors(view, x.dtype, 64, (1, 4), 64))
    rest = (Sizes(Value(256), 2), None, 0.125)
    one = Launch(with_inputs, 5, templates, rest, {"c": 3, "num_warps": 4})
    other = Launch(with_pointers, 6, (), (Sizes(Value(48), 2),), {"c": 3})

    def run_all() -> None:
        one.run((out, None), (x, y))
        one.run((out, None), (y, z))
        other.run((out, (x, y)))

    run_all()
    run_all()
    encoded = fake.utils.encoded
    # What was encoded is not encoded again, and the stream is the current one.
    fake.stream = 8
    run_all()
    say("encoded", fake.utils.encoded - encoded)
    ours = launched[6:]
    launched.clear()
    (compiled, native), *_ = one._compiled.values()
    assert isinstance(native, launcher_internals.NativeLaunch)
    # A hook that someone sets is called by Triton's own launcher.
    hook = print
    knobs.runtime.launch_enter_hook.add(hook)
    one.run((out, None), (x, y))
    knobs.runtime.launch_enter_hook.remove(hook)
    say("hooked", any(isinstance(one, HookChain) for one in launched[0]))
    launched.clear()
    for launch in (one, other):
        for aligned, (theirs, _) in launch._compiled.items():
            launch._compiled[aligned] = theirs, None
    run_all()
    for call, expected in zip(ours, launched, strict=True):
        say("same", same(call, expected))
    # Kernels with scratch memory, or a sanitizer, are Triton's to launch.
    for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled"):
        before = getattr(compiled.run, name, 0)
        setattr(compiled.run, name, 1)
        say(name, launcher_internals.native_launch(compiled, 5, templates))
        setattr(compiled.run, name, before)
    compiled.metadata = compiled.metadata._replace(tensordesc_meta=None)
    say("no descriptors", launcher_internals.native_launch(compiled, 5, templates))
