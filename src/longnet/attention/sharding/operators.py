"""A shard's part of dilated attention as an operator pair of torch, and the call that every rank makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longnet.attention.backends import Backend, select_backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward, check_distances
from longnet.attention.operators import register_attention
from longnet.attention.sharding.attend import Shard
from longnet.attention.sharding.group import Peers, Terms, agree
from longnet.attention.sharding.plan import Place
from longnet.attention.sharding.range_plan import rows_exchanged
from longnet.attention.sharding.ranges import RangeShard, channels
from longnet.geometry.pattern import LONGEST_SEGMENT
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
    spec, offsets = inputs.spec, () if inputs.offsets is None else tuple(inputs.offsets.tolist())
    segment_offset = offsets[0] if offsets else spec.segment_offset
    offsets = offsets if len(set(offsets)) > 1 else ()
    inputs = replace(inputs, offsets=None).with_spec(segment_offset=segment_offset)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, bias) if x is not None)
    terms = Terms(
        query.shape[0], query.shape[1], query.shape[3], query.dtype, gradients, key.shape[1], spec.is_causal,
        mask is not None, 0 if bias is None else bias.shape[1], spec.scale, spec.pattern, offsets or segment_offset,
    )  # fmt: skip
    shards = agree(peers, inputs.length, terms)
    for value in offsets or (segment_offset,):
        if abs(value) > LONGEST_SEGMENT:
            raise ValueError(
                f"segment_offset holds {value}: expected at most {LONGEST_SEGMENT} in magnitude with a group"
            )
    if bias is not None:
        check_distances(bias, spec.pattern, shards.total)
    out, lse, _ = _PAIR.run(inputs, backend.name, shards.lengths, peers.rank, peers.group.group_name, offsets)
    return out, lse


def _place(inputs: AttentionInputs, shards: Sequence[int], rank: int) -> Place:
    heads, kv_heads, spec = inputs.query.shape[1], inputs.key.shape[1], inputs.spec
    return Place(spec.pattern, heads, kv_heads, Shards(tuple(shards)), rank, spec.is_causal, spec.segment_offset)


def _is_published(inputs: AttentionInputs, offsets: Sequence[int]) -> bool:
    return inputs.beyond_paper is None and not offsets


def _shard(
    inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str, offsets: Sequence[int]
) -> Shard | RangeShard:
    members, place, chosen = process_group(group), _place(inputs, shards, rank), select_backend(backend, inputs)
    if _is_published(inputs, offsets):
        return Shard(inputs, place, chosen, members)
    return RangeShard(inputs, place, chosen, members, tuple(offsets))


def _forward(
    inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _shard(inputs, backend, shards, rank, group, offsets).forward()


def _received(
    inputs: AttentionInputs, backend: str, shards: Sequence[int], rank: int, group: str, offsets: Sequence[int]
) -> tuple[Tensor, ...]:
    """The rows that others send, of their shape."""
    place, batch = _place(inputs, shards, rank), inputs.query.shape[0]
    if _is_published(inputs, offsets):
        return (inputs.query.new_empty(place.rows_received, batch, channels(inputs)),)
    batches = Counter(offsets) if offsets else {place.segment_offset: batch}
    return (inputs.query.new_empty(sum(rows_exchanged(place, batches, sent=False)), channels(inputs)),)


def _backward(
    saved: SavedForward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    received: Tensor,
    backend: str,
    shards: Sequence[int],
    rank: int,
    group: str,
    offsets: Sequence[int],
) -> Gradients:
    shard = _shard(saved.inputs, backend, shards, rank, group, offsets)
    return shard.backward(saved, grad_out, grad_lse, received)


_PAIR = register_attention(
    "sharded",
    _forward,
    _backward,
    settings="str backend, int[] shards, int rank, str group, int[] offsets",
    also_saved=_received,
)
