"""A kernel that was launched before is launched without Triton's launcher, and gets the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiled import words_of

from longnet.runtime import launcher_internals
from longnet.runtime.triton_internals import Launch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_the_c_function_is_given_what_triton_gives_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    encoded, hooked, *rows = words_of(Path(__file__).parent / "launch_twice.py")
    assert encoded == ["encoded", "0"] and hooked == ["hooked", "True"]
    assert rows[:3] == [["same", "True"]] * 3
    # Otherwise Triton's own launcher is called.
    assert [row[-1] for row in rows[3:]] == ["None"] * 4


class Template:
    def __init__(self, name="") -> None:
        self.name = name


class Native(launcher_internals.NativeLaunch):
    """With a C function that writes down its arguments."""

    def __init__(self, calls, inputs=(), as_tuple=True) -> None:
        encode = lambda view, form: (view.name, view.base.data_ptr(), form)  # noqa: E731
        function = lambda *arguments: calls.append(arguments)  # noqa: E731
        super().__init__(function, (5,), ("after",), as_tuple, lambda device: f"stream {device}", 3, encode, inputs)


def test_inputs_are_encoded_once_for_an_address() -> None:
    calls = []
    one, two = map(Template, "ab")
    native = Native(calls, (((one, "x"), (two, "y")), ((one, "z"),)), as_tuple=False)
    tensors = torch.zeros(4), torch.ones(4)
    at = [x.data_ptr() for x in tensors]
    native((1, None), tensors, ("rest",))
    native((2, None), tensors, ("rest",))
    first = ("a", at[0], "x", "b", at[0], "y", None, None, None)
    second = ("a", at[1], "z", None, None, None, None)
    assert calls == [(5, "stream 3", "after", number, None, *first, *second, "rest") for number in (1, 2)]
    # The other way round they are other inputs.
    native((3, None), tensors[::-1], ())
    assert calls[-1][5:8] == ("a", at[1], "x") and len(native._encoded) == 4


def test_a_launch_keeps_few_addresses(monkeypatch) -> None:
    monkeypatch.setattr(launcher_internals, "_MOST_ADDRESSES", 2)
    native = Native(calls := [], (((Template(), None),),))
    tensors = [torch.zeros(4) for _ in range(5)]
    for x in tensors:
        native((), (x,), ())
        assert len(native._encoded) <= 2
    assert [call[-1][1] for call in calls] == [x.data_ptr() for x in tensors]


@needs_triton
def test_which_launches_have_hooks(monkeypatch) -> None:
    from triton import knobs

    assert not launcher_internals.has_launch_hooks()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for hook in (print, knobs.HookChain()):
            if hook is not print:
                hook.add(print)
            with monkeypatch.context() as changed:
                changed.setattr(knobs.runtime, name, hook)
                assert launcher_internals.has_launch_hooks()
                changed.setattr(knobs.runtime, name, None)
                assert not launcher_internals.has_launch_hooks()


@needs_triton
@pytest.mark.parametrize(("change", "said"), [
    ({"launch": lambda *arguments: None}, "'launcher'"),
    ({"__call__": lambda self, *arguments: self.launch(*arguments, "more")}, "the kernel's arguments last"),
    ({"make_tensordesc_arg": None}, "make_tensordesc_arg"),
])  # fmt: skip
def test_a_launcher_of_another_form_is_told(change, said, monkeypatch) -> None:
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch": print}
    call = {"__call__": lambda self, *arguments: self.launch(*arguments)}
    kind = type("CudaLauncher", (), {"__module__": nvidia.__name__, **sizes, **call, **change})
    kind.launch = staticmethod(kind.launch)
    if "make_tensordesc_arg" in change:
        monkeypatch.delattr(nvidia, "make_tensordesc_arg")
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=None, get_current_device=lambda: 0))

    class Compiled(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda *arguments: None

    compiled = Compiled(run=kind(), function=1, packed_metadata=(), metadata=SimpleNamespace())
    kernel = SimpleNamespace(warmup=lambda *_, **__: compiled, arg_names=[])
    with pytest.raises(RuntimeError, match=f"an internal of triton .* does not have: .*{said}"):
        Launch(kernel, 1, (), (), {}).run(())
