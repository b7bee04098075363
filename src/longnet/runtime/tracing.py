"""Whether torch traces, and functions that it must not trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

P = ParamSpec("P")
T = TypeVar("T")


def is_traced() -> bool:
    """Whether torch traces: tensors that are made now may be fake, or stand for what a graph will compute."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    # Modes that count or log have no key, and their tensors are real.
    return any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack())


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` as one that a compiled graph breaks around: in it the host reads tensors, or ranks talk.

    By hand, since ``torch.compiler.disable`` imports the compiler when it decorates.
    """

    @wraps(function)
    def called(*arguments: P.args, **options: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return called
