"""Whether torch traces, and functions that it must not trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from longnet.runtime.torch_internals import has_tracing_mode, is_transformed

P = ParamSpec("P")
T = TypeVar("T")


def is_traced() -> bool:
    """Whether torch traces: tensors that are made now may be fake, or stand for what a graph will compute."""
    return torch.compiler.is_compiling() or is_transformed() or has_tracing_mode()


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
