"""The pair of torch operators that every backend registers.

A backend is two functions for a whole pattern: ``forward`` gives (out, lse), ``backward`` gradients. They become operators
(``longnet::<name>`` and ``longnet::<name>_backward``) with fake and autograd registration, so that compilation, export,
checkpointing and FSDP see opaque calls of known shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.attention.call import SPEC, TENSORS, AttentionInputs, Gradients, SavedForward, from_flat
from longnet.runtime.autocast import no_autocast
from longnet.runtime.operators import caller_of, define, no_second_derivative

Forward = Callable[..., tuple[Tensor, ...]]
Backward = Callable[..., Gradients]


class OperatorPair(NamedTuple):
    """A forward operator, differentiable, and its backward operator."""

    run: Callable[..., Any]
    run_backward: Callable[..., Gradients]


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? offsets, Tensor? bias"
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
        return *grads, None, None, None if saved[TENSORS - 1] is None else grad_bias, *[None] * len(ctx.settings)

    call = define(name, forward_op, fake_forward, f"({_INPUTS}, {spec}) -> ({outputs})")
    schema = f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, {outputs}, {spec}) -> {_GRADIENTS}"
    call_backward = define(f"{name}_backward", backward_op, fake_backward, schema)
    torch.library.register_autograd(f"longnet::{name}", autograd_backward, setup_context=setup_context)
    refuse = no_second_derivative(f"{name}_backward")
    torch.library.register_autograd(f"longnet::{name}_backward", refuse)
    forward_of = caller_of(name, call, forward_op, setup_context, autograd_backward)
    backward_of = caller_of(f"{name}_backward", call_backward, backward_op, lambda ctx, inputs, output: None, refuse)

    def run(inputs: AttentionInputs, *settings: Any) -> Any:
        return forward_of(*inputs.flat(), *settings)

    def run_backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, *others: Any) -> Gradients:
        inputs, given, settings = saved.inputs, others[:more], others[more:]
        flat = (*inputs.tensors, saved.out, saved.lse, *given, *inputs.spec.encode(), *settings)
        return Gradients(*call_backward(grad_out, grad_lse, *flat))

    return OperatorPair(run, run_backward)
