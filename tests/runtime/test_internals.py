"""Private names of other libraries: in ``*_internals.py`` alone, for versions that were tried, with errors that teach."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import longnet
from longnet.runtime import torch_internals, triton_internals
from longnet.runtime.tma import View
from longnet.runtime.versions import Tried

PACKAGE = Path(longnet.__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    "tried",
    [torch_internals.TRIED, pytest.param(triton_internals.TRIED, marks=needs_triton)],
    ids=lambda one: one.library,
)
def test_the_installed_version_was_tried(tried: Tried) -> None:
    assert tried.unknown() is None


@pytest.mark.parametrize(
    ("installed", "known"),
    [("2.10.1", False), ("2.11.0", True), ("2.14.1+cu130", True), ("2.15.0.dev1", False), ("3.0", False)],
)
def test_a_version_that_was_not_tried_is_named(installed: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tried, "installed", installed)
    said = Tried("torch", "2.11", "2.14").unknown()
    if known:
        assert said is None
    else:
        assert said == (
            f"torch {installed} is installed and longnet was tried with 2.11 to 2.14: look up every name of torch_internals.py "
            "in it, run the tests, then change TRIED there"
        )


# A private name of torch, and what uses it.
MODULE = nn.Linear(2, 2)


def counted(ask: Callable[[], bool]) -> bool:
    """The answer inside of a dispatch mode: without one there is nothing to look at."""
    with FlopCounterMode(display=False):
        return ask()


TORCH: dict[str, Callable[[Any], Any]] = {
    "torch._C._functorch.peek_interpreter_stack": lambda own: own.is_transformed(),
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": lambda own: counted(own.has_tracing_mode),
    "torch._C._len_torch_dispatch_stack": lambda own: own.has_tracing_mode(),
    "torch._C._cuda_getCurrentRawStream": lambda own: own.current_stream_handle(0),
    "torch.autograd.forward_ad._current_level": lambda own: own.is_differentiated_or_batched(),
    "torch.nn.modules.module._has_any_global_hook": lambda own: own.is_call_changed(MODULE),
    "torch.nn.Module._compiled_call_impl": lambda own: own.is_call_changed(nn.Module()),
    "torch.distributed.distributed_c10d._resolve_process_group": lambda own: own.process_group("0"),
    "torch.distributed.distributed_c10d._get_default_store": lambda own: own.default_store(),
    "torch.nn.modules.batchnorm._BatchNorm": lambda own: own.any_batch_norm(),
    "torch.distributed.device_mesh.DeviceMesh._flatten": lambda own: own.flattened_mesh(SimpleNamespace(), "all"),
    "torch._subclasses.fake_tensor.FakeTensorMode": lambda own: own.fake_tensors(),
    "torch._assert_async": lambda own: own.assert_async(torch.tensor(True)),
    "torch._foreach_copy_": lambda own: own.copy_many([], []),
    "torch._int_mm": lambda own: own.int8_matmul(torch.eye(2), torch.eye(2)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_name_that_torch_has_no_more_is_named_when_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some names are those of torch for CUDA.
    monkeypatch.delattr(name, raising=False)
    own = SimpleNamespace(**runpy.run_path(torch_internals.__file__))
    with pytest.raises(RuntimeError, match=rf"does not have: .*{name.split('.')[-1]}.*Expected torch 2\.\d+ to 2\.\d+"):
        TORCH[name](own)


def test_what_torch_is_asked() -> None:
    x = torch.ones(2)
    states = {
        "nothing": nullcontext,
        "counting": lambda: FlopCounterMode(display=False),
        "fake tensors": FakeTensorMode,
        "forward mode": forward_ad.dual_level,
    }
    for name, state in states.items():
        with state():
            asked = (torch_internals.has_tracing_mode(), torch_internals.has_tangents())
        assert asked == (name == "fake tensors", name == "forward mode"), name
    seen: list[tuple[bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_internals.is_transformed(), torch_internals.is_differentiated_or_batched()))
        return x.sum()

    for run in (look, torch.func.vmap(look), torch.func.grad(look), torch.func.functionalize(look)):
        run(x)
    assert seen == [(False, False), (True, True), (True, True), (True, False)]
    version = torch_internals.version_of(x)
    x.add_(1)
    assert (version, torch_internals.version_of(x)) == (0, 1)
    with torch.inference_mode():
        assert torch_internals.version_of(torch.ones(2)) is None


def test_which_calls_of_a_module_are_changed() -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda one: one.register_forward_hook(print),
        lambda one: one.register_forward_pre_hook(print),
        lambda one: one.register_full_backward_hook(print),
        lambda one: one.register_full_backward_pre_hook(print),
        lambda one: setattr(one, "forward", print),
        lambda one: one.compile(),
    ]
    for change in changes:
        module = nn.Linear(2, 2)
        assert not torch_internals.is_call_changed(module)
        change(module)
        assert torch_internals.is_call_changed(module)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_internals.is_call_changed(nn.Linear(2, 2))
    handle.remove()
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(print)
    module.register_state_dict_pre_hook(print)
    torch_internals.remove_pre_hook(module, print)
    assert torch_internals.hooks_of(module) == [] and not module._state_dict_pre_hooks


@pytest.mark.parametrize("use", ["hooks_of", "parameter_table", "remove_pre_hook"])
def test_a_module_of_another_form_is_told(use: str) -> None:
    more = (print,) if use == "remove_pre_hook" else ()
    with pytest.raises(RuntimeError, match="an internal of torch that torch .* does not have: .*no attribute '_"):
        getattr(torch_internals, use)(SimpleNamespace(), *more)


def test_settings_of_the_compiler_that_are_gone_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"does not have: torch\._dynamo\.config\.no_such_setting"):
        torch_internals.TRIED.get("torch._dynamo.config.no_such_setting")
    with torch_internals.specialised_floats():
        assert torch._dynamo.config.specialize_float


@needs_triton
def test_descriptors_and_launches_of_another_form_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.experimental.gluon.nvidia import hopper

    view = View(64, 32, 0, 64, 128)
    (one, *_) = triton_internals.descriptors(view, torch.bfloat16, 64, (1,), 64)
    assert type(one) is hopper.TensorDescriptor
    monkeypatch.setattr(hopper, "TensorDescriptor", lambda base, *_: SimpleNamespace(tensor=base))
    with pytest.raises(RuntimeError, match="does not have: TensorDescriptor with its tensor as the attribute base"):
        triton_internals.descriptors(view, torch.bfloat16, 64, (1,), 64)
    monkeypatch.delattr(hopper, "TensorDescriptor")
    with pytest.raises(RuntimeError, match="an internal of triton .* cannot import name 'TensorDescriptor'"):
        triton_internals.descriptors(view, torch.bfloat16, 64, (1,), 64)

    kernel = SimpleNamespace(warmup=lambda *_, **__: SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"the compiled kernel as the result of warmup, .* Expected triton 3\.\d+"):
        triton_internals.Launch(kernel, 1, (), (), {}).run((), ())
    with pytest.raises(RuntimeError, match="does not have: .*warmup"):
        triton_internals.Launch(object(), 1, (), (), {}).run((), ())


@needs_triton
def test_kernels_are_compiled_for_no_value_and_run_with_all() -> None:
    class Sizes(NamedTuple):
        length: int
        heads: int

    seen: list[Any] = []

    class Compiled:
        run = None

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: seen.append(("run", grid, arguments))

    def warmup(*arguments: Any, grid: tuple[int, ...], **options: Any) -> Compiled:
        seen.append(("compile", grid, arguments, options))
        return Compiled()

    kernel = SimpleNamespace(warmup=warmup, arg_names=["X", "length", "step", "sizes", "far", "C"])
    value = triton_internals.Value
    rest = (value(48), 16, Sizes(value(1), 4), value(1 << 40))
    launch = triton_internals.Launch(kernel, 7, (), rest, {"C": "c", "num_warps": 4})
    x = torch.zeros(1)
    launch.run((x,))
    launch.run((x,))
    (_, grid, compiled_for, options), *runs = seen
    assert grid == (7, 1, 1) and options == {"C": "c", "num_warps": 4}
    # Neither 1 nor a multiple of 16, and as wide as the number.
    assert compiled_for == (x, 3, 16, Sizes(3, 4), (1 << 33) + 1)
    assert runs == [("run", (7, 1, 1), (x, 48, 16, Sizes(1, 4), 1 << 40, "c"))] * 2
    assert {type(one) for one in runs[0][2][1:]} == {int, Sizes, str} and type(runs[0][2][3].length) is int


@needs_triton
def test_kernels_are_compiled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own mode, with a compiler that waits until all of them are at it."""
    from triton.runtime import _async_compile

    monkeypatch.setattr(triton_internals, "interpreting", lambda: False)
    together, found = Barrier(3, timeout=30), []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def warmup(self, *_: Any, **__: Any) -> None:
            mode = _async_compile.active_mode.get()
            assert mode is not None
            cleanup = lambda *_: None  # noqa: E731
            arguments = (self.name, together.wait, lambda _: found.append(self.name), cleanup)
            mode.submit(*arguments[: len(inspect.signature(mode.submit).parameters)])

    monkeypatch.setattr(triton_internals.os, "cpu_count", lambda: 3)
    launches = [(triton_internals.Launch(Kernel(name), 1, (), (), {}), (), ()) for name in "abc"]
    triton_internals.compile_together(launches)
    assert sorted(found) == ["a", "b", "c"]
    assert _async_compile.active_mode.get() is None
    # One kernel, or the interpreter, has nothing to wait for.
    triton_internals.compile_together(launches[:1])
    monkeypatch.setattr(triton_internals, "interpreting", lambda: True)
    triton_internals.compile_together(launches)
    assert len(found) == 3


def _private(name: str) -> bool:
    # The standard library documents these two.
    return name.startswith("_") and not name.startswith("__") and name not in ("_", "_exit", "_getframe")


def foreign_names(sources: dict[str, str]) -> set[str]:
    """Private names that files use and none of them defines: those of other libraries."""
    used: dict[str, str] = {}
    own: set[str] = set()
    for path, source in sources.items():
        inside = Path(path).name.endswith("_internals.py")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                target = node.id if isinstance(node, ast.Name) else node.attr
                # Who sets an attribute of another object does not define it.
                if isinstance(node, ast.Name) or (
                    isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                ):
                    own.add(target)
                elif _private(target) and not inside:
                    used[target] = f"{path}:{node.lineno}"
            elif isinstance(node, ast.Attribute) and _private(node.attr) and not inside:
                used[node.attr] = f"{path}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and not inside:
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                used |= {part: f"{path}:{node.lineno}" for part in parts if _private(part)}
    return {f"{place} uses {name}" for name, place in used.items() if name not in own}


def test_private_names_of_other_libraries_are_used_in_internals_alone() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert foreign_names(sources) == set()


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch._C.peek()", 1),
        ("from torch._C import peek", 1),
        ("from torch.nn.modules.module import _has_any_global_hook", 1),
        ("def f(module):\n    return module._forward_hooks", 1),
        ("def f(cache):\n    cache._is_user_defined = True", 1),
        ("class A:\n    def _own(self):\n        self._x = 1\n\ndef f(a):\n    return a._own, a._x", 0),
    ],
)
def test_the_check_sees_a_private_name(source: str, count: int) -> None:
    assert len(foreign_names({"a.py": source})) == count
    assert foreign_names({"torch_internals.py": source}) == set()
