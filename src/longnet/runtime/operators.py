"""Functions of real tensors as operators of torch.

Compilation, export, checkpointing and FSDP then see opaque calls of known shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from longnet.runtime.torch_internals import is_differentiated_or_batched, is_observed

_library = torch.library.Library("longnet", "FRAGMENT")


def define(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str | None = None
) -> Callable[..., Any]:
    """Register ``longnet::<name>`` for every device and return it. The schema is that of the function's annotations by default.

    By hand: what ``torch.library.custom_op`` wraps around a call takes longer than attention over a short sequence.
    """
    schema = schema or torch.library.infer_schema(function, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longnet::{name}", fake, lib=_library)
    return getattr(torch.ops.longnet, name).default


def no_second_derivative(name: str) -> Callable[..., None]:
    """The gradient of the operator ``longnet::<name>``, which has none."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"dilated attention (longnet::{name}) has no second derivative: "
            "a gradient taken with create_graph=True cannot be differentiated again"
        )

    return refuse


def caller_of(
    name: str,
    call: Callable[..., Any],
    function: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """How Python calls the operator ``call``. ``torch.func`` transforms it too: what torch.library differentiates, it cannot.

    Where no compiler, transform, dispatch mode, subclass or profiler would see the operator, ``function`` is called without
    torch's dispatcher, which costs much of a short call's host time.

    Args:
        function: what the operator runs.
        setup_context, backward: as ``torch.library.register_autograd`` takes them.

    Raises (when called):
        RuntimeError: in forward-mode AD, of an input with a tangent. The operator by itself would lose it without a word.
    """

    def forward(*inputs: Any) -> Any:
        return call(*inputs)

    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, ...]:
        samples = (
            run(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        )
        outputs = tuple(map(torch.stack, zip(*samples, strict=True)))
        return outputs, (0,) * len(outputs)

    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            f"dilated attention (longnet::{name}) has no forward-mode derivative (torch.func.jvp, jacfwd, hessian and "
            "torch.autograd.forward_ad): expected reverse mode, torch.func.vjp or jacrev"
        )

    def direct_forward(ctx: Any, *inputs: Any) -> Any:
        # With a setup_context of its own torch would look at the signature in every call.
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def differentiable(**functions: Callable[..., Any]) -> Any:
        members = {key: staticmethod(one) for key, one in functions.items()}
        return type(name, (torch.autograd.Function,), members)

    transformed = differentiable(forward=forward, setup_context=setup_context, backward=backward, vmap=vmap, jvp=jvp)
    direct = differentiable(forward=direct_forward, backward=backward)

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(*inputs)
        # The operator is faster, and the same, where nothing is differentiated or batched.
        if is_differentiated_or_batched():
            return transformed.apply(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if is_observed() or any(x.is_meta or type(x) not in _PLAIN for x in tensors):
            return call(*inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return direct.apply(*inputs)
        return function(*inputs)

    return run


# Not subclasses, which see every operator.
_PLAIN = (Tensor, Parameter)
