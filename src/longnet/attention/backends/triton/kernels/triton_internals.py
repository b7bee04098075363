"""What kernels use of Triton that has no public name yet; runtime/triton_internals.py names the versions that were tried."""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform, get_type_hints

from triton.language.core import _aggregate, base_value, constexpr

T = TypeVar("T")


@dataclass_transform()
def aggregate(cls: type[T]) -> type[T]:
    """Kernel state with names: tensors, constants, tuples and other aggregates, one value per annotation. Methods are jitted.

    Triton 3.6 takes no annotations written as strings and makes no constructor, as later versions do.
    """
    fields = get_type_hints(cls)

    def init(self: Any, *args: Any) -> None:
        for name, value in zip(fields, args, strict=True):
            setattr(self, name, value if isinstance(value, base_value) else constexpr(value))

    init.__triton_builtin__ = True  # type: ignore[attr-defined]
    cls.__annotations__, cls.__init__ = fields, init  # type: ignore[method-assign]
    made: type[T] = _aggregate(cls)
    return made
