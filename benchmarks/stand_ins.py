"""What other implementations import and need not be installed: the same calls, carried out by torch's own kernels.

A package that is installed is never replaced.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cuda_flash = torch.ops.aten._scaled_dot_product_flash_attention.default


def flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """torch's flash kernel on (B, N, H, D): out (B, N, H, D), with its gradient, and lse (B, H, N), without."""
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    kernel = _cuda_flash if query.is_cuda else _cpu_flash
    out, lse = kernel(*rows, 0.0, is_causal, scale=scale)[:2]
    return out.transpose(1, 2), lse


def torchscale_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """torchscale's own wrapper of flash-attn: out (B, N, H, D) and lse (B, H, N)."""
    if bias is not None or dropout:
        raise ValueError(f"bias={bias} and dropout={dropout}: expected None and 0")
    return flash(query, key, value, is_causal, softmax_scale)


def packed_flash(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """``flash_attn_unpadded_qkvpacked_func`` of flash-attn 1 for sequences of one length: (B * N, 3, H, D)."""
    if dropout_p or not return_attn_probs or qkv.shape[0] != (len(cu_seqlens) - 1) * max_seqlen:
        raise ValueError("only sequences of one length, without dropout and with the lse returned, can be computed")
    query, key, value = qkv.unflatten(0, (-1, max_seqlen)).unbind(2)
    out, lse = flash(query, key, value, causal, softmax_scale)
    return out.flatten(0, 1), lse, None


class LowerTriangularMask:
    """xformers' word for causal."""


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: LowerTriangularMask | None = None, op: None = None
) -> Tensor:
    """xformers' attention on (B, N, H, D), by ``F.scaled_dot_product_attention``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=attn_bias is not None).transpose(1, 2)


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops' ``rearrange``: split axes, permute, merge axes. Axes in brackets belong together, ``1`` is a new axis."""
    inputs, outputs = _parse(pattern)
    if len(inputs) != x.dim():
        shape = tuple(x.shape)
        raise ValueError(f"{pattern!r} has {len(inputs)} axes on its left side, the tensor {shape} another number")
    lengths: dict[str, int] = {}
    for group, size in zip(inputs, x.shape, strict=True):
        known = math.prod(sizes.get(name, 1) for name in group)
        if sum(name not in sizes for name in group if name != "1") > 1:
            raise ValueError(f"{pattern!r}: the sizes of {group} are not all known")
        if size % known:
            raise ValueError(f"{pattern!r}: an axis of {size} cannot be split by {known}")
        lengths |= {name: sizes.get(name, size // known) for name in group if name != "1"}
    order = [list(lengths).index(name) for group in outputs for name in group if name != "1"]
    merged = [math.prod(lengths.get(name, 1) for name in group) for group in outputs]
    return x.reshape(list(lengths.values())).permute(order).reshape(merged)


@lru_cache(maxsize=256)
def _parse(pattern: str) -> list[list[list[str]]]:
    """Groups of names, left and right of the arrow."""
    sides = (re.findall(r"\(([^)]*)\)|(\S+)", side) for side in pattern.split("->"))
    return [[(inside or alone).split() for inside, alone in side] for side in sides]


def _flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:
    if not return_attn_probs:
        raise ValueError("return_attn_probs=False: expected True, the lse is needed")
    return (*torchscale_flash(q, k, v, dropout_p, None, softmax_scale, causal), None)


def _only_whole_segments(*_: object) -> Any:
    raise ValueError("segments that do not divide the length need flash-attn's own padding functions")


Modules = dict[str, dict[str, Any]]
_LENT: Modules = {
    "einops": {"rearrange": rearrange},
    "flash_attn": {},
    "flash_attn.flash_attn_interface": {
        "flash_attn_func": _flash_attn_func,
        "flash_attn_unpadded_qkvpacked_func": packed_flash,
    },
    "flash_attn.bert_padding": {"unpad_input": _only_whole_segments, "pad_input": _only_whole_segments},
    "xformers": {},
    "xformers.ops": {
        "AttentionOp": object,
        "LowerTriangularMask": LowerTriangularMask,
        "memory_efficient_attention": memory_efficient_attention,
    },
}


def missing(*more: Modules) -> tuple[str, ...]:
    """The packages that :func:`lent` would stand in for, those of ``more`` included."""
    tops = dict.fromkeys(name.partition(".")[0] for modules in (_LENT, *more) for name in modules)
    return tuple(name for name in tops if importlib.util.find_spec(name) is None)


@contextmanager
def lent(*paths: Path, more: Modules | None = None, always: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """While it lasts, modules are found in ``paths`` first, and missing packages are stood in for; gives their names.

    Args:
        more: modules to lend besides. always: packages among them that are replaced where they are installed.
    """
    before, replaced, table = list(sys.path), {}, {}
    sys.path[:0] = map(str, paths)
    try:
        absent = missing(more) if more else missing()
        packages = (*(name for name in absent if name not in always), *always)
        every = {**_LENT, **(more or {})}
        table = {name: names for name, names in every.items() if name.partition(".")[0] in packages}
        replaced = {name: sys.modules[name] for name in table if name in sys.modules}
        for name, names in table.items():
            module = ModuleType(name, f"Lent by longnet's benchmark in place of {name}.")
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module).update(names)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
            sys.modules[name] = module
        yield packages
    finally:
        for name in table:
            sys.modules.pop(name, None)
        sys.modules.update(replaced)
        # What is imported may append to sys.path itself.
        sys.path[:] = before
