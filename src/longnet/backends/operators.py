"""What every backend shares: the operator pair it registers and the views its kernels read.

A backend is two functions on real tensors, ``forward -> (out, lse)`` and ``backward -> gradients``, for a whole pattern.
They become two operators of their own (``longnet::<name>`` and ``longnet::<name>_backward``) with fake and autograd
registration, so that compilation, export, checkpointing and FSDP see opaque, shape-correct calls.
A backend whose kernels yield per-branch results mixes them with :mod:`longnet.mixing`; one that fuses the mix does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from longnet.geometry import Pattern, Tile

ForwardFn = Callable[..., tuple[Tensor, Tensor]]
BackwardFn = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Spec:
    """What is computed, apart from the tensors. Source: arXiv 2307.02486, sections 2.2 to 2.4.

    Args:
        read_by_first: of the results only the rows that the first token attends to in some head are read, see
            :func:`longnet.geometry.wanted.read_by_first`. The others may be anything finite, and whoever asks has to give
            them an lse of inf before the backward pass.
    """

    pattern: Pattern
    is_causal: bool
    scale: float
    read_by_first: bool = False


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and mixing are float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast rounds to on devices of a type; None where it is off, or where there is none."""
    # torch 2.11 cannot trace the question, and compiles for no device without autocast but meta.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    known = available and device_type != "meta"
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """An operator's inputs have been cast already; inside, float32 means float32."""
    kind = x.device.type
    # torch 2.11 cannot trace the question, and compiles for no device without autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


_library = torch.library.Library("longnet", "FRAGMENT")


def define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``longnet::<name>`` for every device and return it.

    By hand: what ``torch.library.custom_op`` wraps around a call takes longer than attention over a short sequence.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longnet::{name}", fake, lib=_library)
    return getattr(torch.ops.longnet, name).default


def fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward operator returns, in shapes."""
    grad_bias = query.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_bias


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


def register_operators(
    name: str, forward: ForwardFn, backward: BackwardFn
) -> tuple[Callable[..., tuple[Tensor, Tensor]], BackwardFn]:
    """Register a backend's operator pair and return it: the differentiable forward, and the backward by itself.

    ``forward(query, key, value, padding, bias, spec) -> (out, lse)`` and
    ``backward(grad_out, grad_lse, query, key, value, padding, bias, out, lse, spec)
    -> (grad_query, grad_key, grad_value, grad_bias)``, where ``padding`` is (B, N) bool or None, ``bias`` is
    (H, 2L - 1) by relative distance or None, ``grad_lse`` may be None and ``grad_bias`` is empty without a bias.
    """

    def forward_op(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offsets: str,
        is_causal: bool,
        scale: float,
        head_numbers: Sequence[int] | None = None,
        total_heads: int = 0,
        read_by_first: bool = False,
    ) -> tuple[Tensor, Tensor]:
        pattern = _parsed(segment_lengths, dilation_rates, head_offsets, head_numbers, total_heads)
        spec = Spec(pattern, is_causal, scale, read_by_first)
        with no_autocast(query):
            return forward(query, key, value, padding, bias, spec)

    def fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))

    def backward_op(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offsets: str,
        is_causal: bool,
        scale: float,
        head_numbers: Sequence[int] | None = None,
        total_heads: int = 0,
        read_by_first: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pattern = _parsed(segment_lengths, dilation_rates, head_offsets, head_numbers, total_heads)
        spec = Spec(pattern, is_causal, scale, read_by_first)
        with no_autocast(query):
            return backward(grad_out, grad_lse, query, key, value, padding, bias, out, lse, spec)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, padding, bias, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, padding, bias, *output)
        # An lse that nobody differentiates then arrives as None and costs nothing.
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, padding, bias, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        *grads, grad_bias = backward_of(grad_out, grad_lse, query, key, value, padding, bias, out, lse, *ctx.settings)
        return (*grads, None, None if bias is None else grad_bias, *[None] * len(ctx.settings))

    call_forward = define(name, forward_op, fake_forward)
    call_backward = define(f"{name}_backward", backward_op, fake_backward)
    torch.library.register_autograd(f"longnet::{name}", autograd_backward, setup_context=setup_context)
    refuse = no_second_derivative(f"{name}_backward")
    torch.library.register_autograd(f"longnet::{name}_backward", refuse)
    forward_of = transformable(name, call_forward, setup_context, autograd_backward)
    backward_of = transformable(f"{name}_backward", call_backward, lambda ctx, inputs, output: None, refuse)

    def run(
        query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        return forward_of(query, key, value, padding, bias, *_settings(spec))

    def run_backward(*tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, spec = tensors  # type: ignore[assignment]
        return call_backward(*tensors, *_settings(spec))

    return run, run_backward


def _settings(spec: Spec) -> tuple[Any, ...]:
    """A spec as an operator takes it."""
    lengths, rates, head_offsets, *numbers = pattern_settings(spec.pattern)
    return lengths, rates, head_offsets, spec.is_causal, spec.scale, *numbers, spec.read_by_first


def _parsed(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: str,
    head_numbers: Sequence[int] | None,
    total_heads: int,
) -> Pattern:
    """The pattern that an operator was called with, from :func:`pattern_settings`."""
    numbers = None if head_numbers is None else tuple(head_numbers)
    return _parse(tuple(segment_lengths), tuple(dilation_rates), head_offsets, numbers, total_heads)


_parse = lru_cache(maxsize=256)(Pattern.parse)


def pattern_settings(pattern: Pattern) -> tuple[Any, ...]:
    """The arguments of :meth:`Pattern.parse` that give this pattern, as operators take them."""
    numbers = (None, 0) if pattern.head_numbers is None else (pattern.head_numbers.numbers, pattern.head_numbers.total)
    return pattern.segment_lengths, pattern.dilation_rates, pattern.head_offsets, *numbers


def tile_view(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of x (B, H, N, ...) as a view (B, segments, offsets, heads, rows, ...), no copy."""
    batch, head, token, *rest = x.stride()
    return x.as_strided(
        (x.shape[0], *tile.shape, *x.shape[3:]),
        (batch, *tile.strides(head, token), *rest),
        x.storage_offset() + tile.origin(head, token),
    )


def padding_view(padding: Tensor, tile: Tile) -> Tensor:
    """The tile's entries of a (B, N) mask as a view (B, segments, offsets, 1, rows): all heads share them."""
    batch, token = padding.stride()
    segment, offset, _, row = tile.strides(0, token)
    segments, offsets, _, rows = tile.shape
    return padding.as_strided(
        (padding.shape[0], segments, offsets, 1, rows),
        (batch, segment, offset, 0, row),
        padding.storage_offset() + tile.origin(0, token),
    )


def rows_without_keys(padded: Tensor, is_causal: bool) -> Tensor:
    """Which rows of (..., rows) see no key at all when ``padded`` keys are left out."""
    if is_causal:
        return padded.to(torch.int32).cumprod(-1).bool()
    return padded.all(-1, keepdim=True).expand_as(padded)


def signed(x: Tensor, scale: float) -> Tensor:
    """x times the sign of the scale: a kernel that needs a scale above 0 gets the sign with the query."""
    return x if scale > 0 else -x if scale < 0 else torch.zeros_like(x)


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """(B, Hk, N, D) to (B, Hk * group, N, D): the key/value head that each query head reads."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def sum_heads(grad: Tensor, group: int) -> Tensor:
    """The transpose of :func:`repeat_heads`: gradients of the query heads that share a key/value head, added up."""
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)
