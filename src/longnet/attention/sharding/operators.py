"""A shard's part of dilated attention as an operator pair of torch, and the call that every rank makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longnet.attention.backends import Backend, select_backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, check_distances
from longnet.attention.operators import register_attention
from longnet.attention.sharding.attend import Shard
from longnet.attention.sharding.group import Peers, Terms, agree
from longnet.attention.sharding.plan import Place
from longnet.geometry.shards import Shards
from longnet.runtime.torch_internals import process_group
from longnet.runtime.tracing import untraced


# Ranks agree in here, on the host: a compiled graph breaks around it, and goes on after it.
@untraced
def sharded_attention(inputs: AttentionInputs, backend: Backend, peers: Peers) -> tuple[Tensor, Tensor]:
    """This rank's rows of one call over the shards of all ranks: (out, lse) like a backend's ``run``.

    Raises:
        ValueError: on every rank, when ranks differ in what they call.
    """
    query, key, value, mask, _, bias = inputs.tensors
    spec = inputs.spec
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias) if x is not None)
    terms = Terms(
        query.shape[0], query.shape[1], key.shape[1], query.shape[3], query.dtype, spec.is_causal, mask is not None,
        0 if bias is None else bias.shape[1], gradients, spec.scale, spec.pattern,
    )  # fmt: skip
    shards = agree(peers, inputs.length, terms)
    if bias is not None:
        check_distances(bias, spec.pattern, shards.total)
    out, lse, _ = _PAIR.run(inputs, backend.name, shards.lengths, peers.rank, peers.group.group_name)
    return out, lse


def _place(inputs: AttentionInputs, shards: Sequence[int], rank: int) -> Place:
    heads, kv_heads, spec = inputs.query.shape[1], inputs.key.shape[1], inputs.spec
    return Place(spec.pattern, heads, kv_heads, Shards(tuple(shards)), rank, spec.is_causal)


def _shard(inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str) -> Shard:
    members = process_group(group)
    return Shard(inputs, _place(inputs, shards, rank), select_backend(backend, inputs), members)


def _forward(
    inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _shard(inputs, backend, shards, rank, group).forward()


def _received(
    inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str
) -> tuple[Tensor, ...]:
    """The rows that others send, of their shape."""
    channels = 2 * inputs.query.shape[-1] + (inputs.mask is not None)
    return (inputs.query.new_empty(_place(inputs, shards, rank).rows_received, inputs.query.shape[0], channels),)


def _backward(
    saved: SavedForward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    received: Tensor,
    backend: str,
    shards: Sequence[int],
    rank: int,
    group: str,
) -> Gradients:
    return _shard(saved.inputs, backend, shards, rank, group).backward(saved, grad_out, grad_lse, received)


_PAIR = register_attention(
    "sharded", _forward, _backward, settings="str backend, int[] shards, int rank, str group", also_saved=_received
)
