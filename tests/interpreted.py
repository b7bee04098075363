"""Triton's interpreter without work that nothing comes of, and with a GPU's rounding: tests take half the time.

What is done here is known of Triton 3.9; an interpreter that is built another way stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch


class _Nothing:
    def restore(self) -> None:
        pass


@functools.cache
def hasten() -> None:
    """For the rest of the process; any number of calls do it once."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _drop_unread_checks(interpreter)
    _patch_once_a_launch(interpreter)
    _round_to_nearest(interpreter)


def _round_to_nearest(interpreter: Any) -> None:
    """float32 becomes bfloat16 as on a GPU, rounded to the nearest; the interpreter cuts off what does not fit."""
    real, language = getattr(interpreter, "_convert_float", None), getattr(interpreter, "tl", None)
    if real is None or language is None:
        return

    def convert(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if given == language.float32 and wanted == language.bfloat16:
            exact = torch.from_numpy(np.ascontiguousarray(values))
            return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return real(values, given, wanted, rounding)

    interpreter._convert_float = convert


def _drop_unread_checks(interpreter: Any) -> None:
    """Every sum and product of integers is computed again in 64 bits, for an assertion that only exists in debug mode."""
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if getattr(options, "debug", None) is False and getattr(options, "sanitize_overflow", False):
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _patch_once_a_launch(interpreter: Any) -> None:
    """A launch replaces the functions of Triton's language; a function that a kernel calls replaces them all again."""
    real, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if real is None or not hasattr(scope, "restore"):
        return
    # The language's modules that are replaced now, by id; a launch is under way while there are any.
    now: set[int] = set()

    class OfLaunch:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            now.clear()
            self.inner.restore()

    # By a module's names and how many there are: the first call of a function adds some.
    known: dict[tuple[int, int], set[int]] = {}

    def patch_lang(fn: Any) -> Any:
        names = fn.__globals__
        modules = known.get((id(names), len(names)))
        if modules is None:
            languages = (interpreter.tl, interpreter.tl.core)
            modules = {id(value) for value in names.values() if inspect.ismodule(value) and value in languages}
            known[id(names), len(names)] = modules
        if now and modules <= now:
            return _Nothing()
        is_launch = not now
        found = real(fn)
        now.update(modules)
        return OfLaunch(found) if is_launch else found

    interpreter._patch_lang = patch_lang
