"""Private names of torch: all that the library uses, so that a new torch is compared with this file alone."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad

from longnet.runtime.versions import Tried

TRIED = Tried("torch", "2.11", "2.14")

# Looked up once: most are asked in every call.
_functorch_level = TRIED.function("torch._C._functorch.peek_interpreter_stack")
_dispatch_modes = TRIED.function("torch.utils._python_dispatch._get_current_dispatch_mode_stack")
_dispatch_mode_count = TRIED.function("torch._C._len_torch_dispatch_stack")
_is_profiled = TRIED.function("torch.autograd._profiler_enabled")
# Of the current stream of a GPU by its number; torch without CUDA has none.
current_stream_handle = TRIED.function("torch._C._cuda_getCurrentRawStream")
# Whether hooks are registered that every module runs.
has_global_hooks = TRIED.function("torch.nn.modules.module._has_any_global_hook")
# The process group of a name, and the store that the default group met in.
process_group = TRIED.function("torch.distributed.distributed_c10d._resolve_process_group")
default_store = TRIED.function("torch.distributed.distributed_c10d._get_default_store")
# The CPU's own flash attention and its backward pass; ``scaled_dot_product_attention`` returns no lse.
cpu_flash = TRIED.function("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
cpu_flash_backward = TRIED.function("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
gpu_flash = TRIED.function("torch.ops.aten._scaled_dot_product_flash_attention.default")
# The class of tensors with a shape and no memory.
FakeTensor: Any = TRIED.function("torch._subclasses.fake_tensor.FakeTensor")
# Operators without a public form: raise on the device, copy many tensors in one launch, multiply int8 matrices.
assert_async = TRIED.function("torch._assert_async")
copy_many = TRIED.function("torch._foreach_copy_")
int8_matmul = TRIED.function("torch._int_mm")


def has_tangents() -> bool:
    """Whether forward-mode AD is on: a tensor may have a tangent."""
    try:
        return forward_ad._current_level >= 0
    except AttributeError as error:
        raise TRIED.gone(error) from None


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, functionalisation among them."""
    return _functorch_level() is not None


def is_differentiated_or_batched() -> bool:
    """Whether forward-mode AD is on, or a transform of ``torch.func`` that changes more than how tensors are written to."""
    level = _functorch_level()
    return (level is not None and level.key().name != "Functionalize") or has_tangents()


def is_observed() -> bool:
    """Whether a transform of ``torch.func``, a dispatch mode or torch's profiler sees every operator."""
    return is_transformed() or has_dispatch_modes() or _is_profiled()


def has_dispatch_modes() -> bool:
    """Whether a dispatch mode sees every operator: torch's own, or one that counts or logs."""
    return _dispatch_mode_count() > 0


def has_tracing_mode() -> bool:
    """Whether a dispatch mode of torch's own makes tensors fake or records them; modes that count or log have no key."""
    # Asked often, and there is mostly none.
    return has_dispatch_modes() and any(getattr(mode, "_mode_key", None) is not None for mode in _dispatch_modes())


def hooks_of(module: nn.Module) -> list[int]:
    """The numbers of the hooks that a call of the module runs; torch gives every hook a number of its own."""
    try:
        tables = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    except AttributeError as error:
        raise TRIED.gone(error) from None
    return [number for table in tables for number in table]


def is_call_changed(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's ``forward``, or something else.

    Who replaces ``forward`` of one module (accelerate, say) or compiles it in place leaves its class as it is.
    """
    try:
        # Asked for every projection of every call: no list, as hooks_of makes.
        before, after = (
            module._forward_pre_hooks or module._backward_pre_hooks,
            module._forward_hooks or module._backward_hooks,
        )
        compiled = module._compiled_call_impl is not None
    except AttributeError as error:
        raise TRIED.gone(error) from None
    return bool(before or after or compiled or "forward" in module.__dict__ or has_global_hooks())


def parameter_table(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """The module's own parameters by name, to be replaced without its checks."""
    table: MutableMapping[str, nn.Parameter | None] = TRIED.of(module, "_parameters")
    return table


def any_batch_norm() -> type[nn.Module]:
    """The class that torch's batch norms share."""
    kind: type[nn.Module] = TRIED.get("torch.nn.modules.batchnorm._BatchNorm")
    return kind


def flattened_mesh(mesh: Any, name: str) -> Any:
    """The ``DeviceMesh`` with all its axes as one of this name."""
    return TRIED.of(mesh, "_flatten")(name)


def remove_pre_hook(module: nn.Module, function: Any) -> None:
    """Remove a hook before ``forward`` or ``state_dict`` by its function: a copied module has no handle of its hooks."""
    # Flags that torch holds beside a hook do nothing.
    for name in ("_forward_pre_hooks", "_state_dict_pre_hooks"):
        table = TRIED.of(module, name)
        for number in [number for number, hook in table.items() if hook is function]:
            del table[number]


def version_of(x: Tensor) -> int | None:
    """How often the tensor was written to; None in inference mode, whose tensors do not count."""
    try:
        return None if x.is_inference() else x._version
    except AttributeError as error:
        raise TRIED.gone(error) from None


def many_recompilations() -> AbstractContextManager[Any]:
    """Inside, ``torch.compile`` makes as many graphs of one function as blocks of all types need, in training and evaluation.

    By default it gives up after 8.
    """
    TRIED.get("torch._dynamo.config.recompile_limit")
    settings: Any = TRIED.get("torch._dynamo.config")
    return settings.patch(recompile_limit=64)


def specialised_floats() -> AbstractContextManager[Any]:
    """Inside, ``torch.compile`` takes Python floats as constants."""
    TRIED.get("torch._dynamo.config.specialize_float")
    settings: Any = TRIED.get("torch._dynamo.config")
    return settings.patch(specialize_float=True)


def fake_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors that are made have shapes, dtypes and devices, and no memory."""
    mode: AbstractContextManager[Any] = TRIED.get("torch._subclasses.fake_tensor.FakeTensorMode")()
    return mode
