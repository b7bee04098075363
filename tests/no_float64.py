"""A device without float64, as Apple's GPUs: meta tensors under a mode that refuses float64 there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 tensor on meta. What the host reads of a meta tensor is 0 or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if read and func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        if read and func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.is_meta and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} has a float64 tensor on a device that has none")
        return out
