"""Functions of real tensors as operators of torch, and the operator pair that every backend registers.

A backend is two functions for a whole pattern: ``forward`` gives (out, lse), ``backward`` gradients. They become operators
(``longnet::<name>`` and ``longnet::<name>_backward``) with fake and autograd registration, so that compilation, export,
checkpointing and FSDP see opaque calls of known shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from longnet.call import SPEC, TENSORS, AttentionInputs, Gradients, SavedForward, from_flat

Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., Gradients]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """An operator's inputs have been cast already; inside, float32 means float32."""
    kind = x.device.type
    # torch 2.11 cannot trace the question, and compiles for no device without autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


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


def transformable(
    name: str, call: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator ``call`` in a form that ``torch.func`` transforms as well: what torch.library differentiates, it cannot.

    Args:
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

    functions = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap, "jvp": jvp}
    members = {key: staticmethod(function) for key, function in functions.items()}
    differentiable = type(name, (torch.autograd.Function,), members)

    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return call(*inputs)
        # The operator is faster, and the same, where nothing is differentiated or batched.
        level = _functorch.peek_interpreter_stack()
        transformed = level is not None and level.key() != _functorch.TransformType.Functionalize
        if transformed or forward_ad._current_level >= 0:
            return differentiable.apply(*inputs)  # type: ignore[attr-defined]
        return call(*inputs)

    return run


class OperatorPair(NamedTuple):
    """A forward operator, differentiable, and its backward operator."""

    run: Callable[..., Any]
    run_backward: Callable[..., Gradients]


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias"
_GRADIENTS = "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"


def register_attention(
    name: str,
    forward: Forward,
    backward: Backward,
    *,
    settings: str = "",
    also_saved: Callable[..., tuple[Tensor, ...]] | None = None,
) -> OperatorPair:
    """Register ``longnet::<name>`` and ``longnet::<name>_backward``.

    Args:
        forward: ``forward(inputs, *settings)`` gives (out, lse), and more tensors that the backward pass gets.
        backward: ``backward(saved, grad_out, grad_lse, *more, *settings)``, where ``grad_lse`` may be None.
        settings: the schema of what both take besides, ``"str backend, int rank"`` say.
        also_saved: ``also_saved(inputs, *settings)`` gives the forward's other tensors, of their shapes; None for none.

    Returns:
        ``run(inputs, *settings)``, which gives what ``forward`` gives, and ``run_backward``, called as ``backward`` is.
    """
    more = 0 if also_saved is None else 1
    spec = "int[] spec, float scale" + (f", {settings}" if settings else "")
    outputs = ", ".join(("Tensor out", "Tensor lse", *(["Tensor also_saved"] * more)))
    count = 2 + more

    def parsed(arguments: tuple[Any, ...]) -> tuple[AttentionInputs, tuple[Any, ...]]:
        return from_flat(arguments[: TENSORS + SPEC]), arguments[TENSORS + SPEC :]

    def forward_op(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, settings = parsed(arguments)
        with no_autocast(inputs.query):
            return forward(inputs, *settings)

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, settings = parsed(arguments)
        return *inputs.empty_outputs(), *(() if also_saved is None else also_saved(inputs, *settings))

    def split(arguments: tuple[Any, ...]) -> tuple[SavedForward, tuple[Any, ...], tuple[Any, ...]]:
        tensors, saved, rest = arguments[:TENSORS], arguments[TENSORS : TENSORS + count], arguments[TENSORS + count :]
        inputs, settings = parsed((*tensors, *rest))
        return SavedForward(inputs, *saved[:2]), saved[2:], settings

    def backward_op(grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any) -> Gradients:
        saved, others, settings = split(arguments)
        with no_autocast(grad_out):
            return backward(saved, grad_out, grad_lse, *others, *settings)

    def fake_backward(grad_out: Tensor, grad_lse: Tensor | None, *arguments: Any) -> Gradients:
        return split(arguments)[0].inputs.empty_gradients()

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings = inputs[TENSORS:]
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        # The gradient of an lse that is not used then arrives as None and costs nothing.
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[TENSORS])
        *grads, grad_bias = backward_of(grad_out, grad_lse, *saved, *ctx.settings)
        return *grads, None, None if saved[TENSORS - 1] is None else grad_bias, *[None] * len(ctx.settings)

    call = define(name, forward_op, fake_forward, f"({_INPUTS}, {spec}) -> ({outputs})")
    schema = f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, {outputs}, {spec}) -> {_GRADIENTS}"
    call_backward = define(f"{name}_backward", backward_op, fake_backward, schema)
    torch.library.register_autograd(f"longnet::{name}", autograd_backward, setup_context=setup_context)
    refuse = no_second_derivative(f"{name}_backward")
    torch.library.register_autograd(f"longnet::{name}_backward", refuse)
    forward_of = transformable(name, call, setup_context, autograd_backward)
    backward_of = transformable(f"{name}_backward", call_backward, lambda ctx, inputs, output: None, refuse)

    def run(inputs: AttentionInputs, *settings: Any) -> Any:
        return forward_of(*inputs.flat(), *settings)

    def run_backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, *others: Any) -> Gradients:
        inputs, given, settings = saved.inputs, others[:more], others[more:]
        flat = (*inputs.tensors, saved.out, saved.lse, *given, *inputs.spec.encode(), *settings)
        return Gradients(*call_backward(grad_out, grad_lse, *flat))

    return OperatorPair(run, run_backward)
