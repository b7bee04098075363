"""A shard's part of dilated attention as an operator pair of torch, and the call that every rank makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from longnet.backends import Backend, Spec, select_backend
from longnet.backends.operators import (
    define,
    fake_backward,
    lse_dtype,
    no_autocast,
    no_second_derivative,
    pattern_settings,
    transformable,
)
from longnet.geometry import Pattern
from longnet.geometry.shards import Shards
from longnet.sharding.attend import Shard
from longnet.sharding.group import Peers, Terms, agree, untraced
from longnet.sharding.plan import Place


# Ranks agree in here, on the host: a compiled graph breaks around it, and goes on after it.
@untraced
def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    backend: Backend,
    peers: Peers,
) -> tuple[Tensor, Tensor]:
    """This rank's rows of one call over the shards of all ranks: (out, lse) like a backend's ``run``.

    Raises:
        ValueError: on every rank, when ranks differ in what they call.
    """
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias) if x is not None)
    terms = Terms(
        query.shape[0], query.shape[1], key.shape[1], query.shape[3], query.dtype, spec.is_causal, padding is not None,
        0 if bias is None else bias.shape[1], gradients, spec.scale, spec.pattern,
    )  # fmt: skip
    shards = agree(peers, query.shape[2], terms)
    pattern = spec.pattern
    reach = min(max(pattern.segment_lengths), max(1, shards.total))
    if bias is not None and bias.shape[1] < 2 * reach - 1:
        raise ValueError(f"distance_bias holds {bias.shape[1]} distances: expected at least {2 * reach - 1}")
    out, lse, _ = _forward_of(
        query, key, value, padding, bias, *pattern_settings(pattern),
        spec.is_causal, spec.scale, backend.name, shards.lengths, peers.rank, peers.group.group_name,
    )  # fmt: skip
    return out, lse


def _shard(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, *settings: Any
) -> Shard:
    *given, is_causal, scale, backend, shards, rank, group = settings
    pattern = Pattern.parse(*given)
    place = Place(pattern, query.shape[1], key.shape[1], Shards(tuple(shards)), rank, is_causal)
    chosen = select_backend(backend, query.device.type, query.dtype, query.shape[-1], bias is not None)
    spec = Spec(pattern, is_causal, scale)
    return Shard(query, key, value, padding, bias, spec, place, chosen, distributed_c10d._resolve_process_group(group))  # type: ignore[attr-defined]


def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: str,
    head_numbers: Sequence[int] | None,
    total_heads: int,
    is_causal: bool,
    scale: float,
    backend: str,
    shards: Sequence[int],
    rank: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (segment_lengths, dilation_rates, head_offsets, head_numbers, total_heads)
    settings = (*given, is_causal, scale, backend, shards, rank, group)
    with no_autocast(query):
        return _shard(query, key, value, padding, bias, *settings).forward()


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *given, is_causal, _, _, shards, rank, _ = settings
    pattern = Pattern.parse(*given)
    place = Place(pattern, query.shape[1], key.shape[1], Shards(tuple(shards)), rank, is_causal)
    channels = 2 * query.shape[-1] + (padding is not None)
    lse = query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))
    return torch.empty_like(query), lse, query.new_empty(place.rows_received, query.shape[0], channels)


def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    received: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: str,
    head_numbers: Sequence[int] | None,
    total_heads: int,
    is_causal: bool,
    scale: float,
    backend: str,
    shards: Sequence[int],
    rank: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (segment_lengths, dilation_rates, head_offsets, head_numbers, total_heads)
    settings = (*given, is_causal, scale, backend, shards, rank, group)
    with no_autocast(query):
        shard = _shard(query, key, value, padding, bias, *settings)
        return shard.backward(grad_out, grad_lse, received, out, lse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, padding, bias, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, padding, bias, *output)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    query, key, value, padding, bias, *output = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(output[0])
    *grads, grad_bias = _backward_of(grad_out, grad_lse, query, key, value, padding, bias, *output, *ctx.settings)
    return (*grads, None, None if bias is None else grad_bias, *[None] * len(ctx.settings))


_refuse = no_second_derivative("sharded_backward")
_forward = define("sharded", _forward_op, _fake_forward)
_backward = define("sharded_backward", _backward_op, fake_backward)
torch.library.register_autograd("longnet::sharded", _autograd_backward, setup_context=_setup_context)
torch.library.register_autograd("longnet::sharded_backward", _refuse)
_forward_of = transformable("sharded", _forward, _setup_context, _autograd_backward)
_backward_of = transformable("sharded_backward", _backward, lambda ctx, inputs, output: None, _refuse)
