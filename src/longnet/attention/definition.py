"""Which attention a call computes: the paper's, or another one that takes the same arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs
from longnet.attention.packed import packed_attention
from longnet.attention.sharding import Peers, sharded_attention
from longnet.geometry import Pattern, uncovered_positions
from longnet.geometry.reach import LayerAttention, uncovered_by_stack

# Positions that are counted for a warning where a pattern's selection does not repeat early enough to count them all.
_COUNTED = 1 << 20
# Where a pattern is beyond the paper.
_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class AttentionDefinition:
    """What is computed from query, key and value, and what else it can be asked for.

    Args:
        name: for errors.
        run: (checked inputs, backend, the ranks of a shared sequence or None) to (out, lse).
        takes_all_options: it takes documents, shards, a relative bias and a :class:`longnet.DilatedCache`, and padded tokens
            count as positions.
        takes_needed_by_first: it can leave out rows, see :class:`longnet.attention.call.AttentionSpec`.
    """

    name: str
    run: Callable[[AttentionInputs, Backend, Peers | None], tuple[Tensor, Tensor]]
    takes_all_options: bool = True
    takes_needed_by_first: bool = False


def _run(inputs: AttentionInputs, backend: Backend, peers: Peers | None) -> tuple[Tensor, Tensor]:
    if inputs.spec.documents is not None:
        return packed_attention(inputs, backend)
    if peers is not None and peers.size > 1:
        return sharded_attention(inputs, backend, peers)
    if peers is not None and inputs.offsets is not None:
        # A group's are on the host.
        inputs = replace(inputs, offsets=inputs.offsets.to(inputs.query.device))
    return backend.run(inputs)


# arXiv 2307.02486, sections 2.2 to 2.4.
LONGNET = AttentionDefinition("LongNet's attention", _run)


@lru_cache(maxsize=256)
def warn_uncovered(pattern: Pattern, heads: int) -> None:
    """Warn, once per pattern and number of heads, of positions that no head ever reaches."""
    if pattern.beyond_paper is not None:
        _warn_unread(pattern, heads)
        return
    counted = "all"
    try:
        uncovered = uncovered_positions(pattern, heads)
    except ValueError:
        # The selection repeats too late to be counted. A warning must not stop a valid call: count the first positions.
        uncovered = uncovered_positions(pattern, heads, _COUNTED)
        counted = f"the first {_COUNTED:,}"
    if uncovered:
        warnings.warn(
            f"segment_lengths={pattern.given_lengths} and dilation_rates={pattern.dilation_rates} with {heads} heads "
            f"leave {uncovered.description} to no head ({float(uncovered.fraction):.1%} of {counted}): they get zero "
            "attention. Use at least as many heads as the rate, or add a branch of rate 1.",
            UserWarning,
            stacklevel=4,
        )


def warn_uncovered_by_stack(layers: tuple[LayerAttention, ...]) -> None:
    """As :func:`warn_uncovered`, once for the layers of a model together."""
    if len({(layer.pattern, layer.heads, layer.segment_offset) for layer in layers}) == 1:
        warn_uncovered(layers[0].pattern, layers[0].heads)
    else:
        _warn_uncovered_together(layers)


@lru_cache(maxsize=256)
def _warn_uncovered_together(layers: tuple[LayerAttention, ...]) -> None:
    uncovered = uncovered_by_stack(layers, _LOOKED_AT)
    if uncovered:
        first = next(place for place in range(_LOOKED_AT) if uncovered >> place & 1)
        warnings.warn(
            f"the layers together leave {uncovered.bit_count() / _LOOKED_AT:.1%} of the first {_LOOKED_AT:,} positions to no "
            f"head (position {first} is the first): they get zero attention. Use at least as many heads as the rates, or add a "
            "branch of rate 1, a window or another layer type.",
            UserWarning,
            stacklevel=5,
        )


def _warn_unread(pattern: Pattern, heads: int) -> None:
    """As :func:`warn_uncovered`, of the first positions of a grid that begins at 0."""
    if pattern.window is not None:
        return
    position = torch.arange(_LOOKED_AT, device="cpu")
    unread = torch.ones_like(position, dtype=torch.bool)
    for branch in pattern.branches:
        for offset in {pattern.offset(branch, head, heads) for head in range(heads)}:
            unread &= ~branch.selects(position, offset)
    if count := int(unread.sum()):
        first = ", ".join(map(str, unread.nonzero()[:4, 0].tolist()))
        what = "get zero attention" if pattern.dilated_queries else "are read by no query"
        whose = "key/value heads" if pattern.head_offsets == "grouped" else "heads"
        warnings.warn(
            f"segment_lengths={pattern.given_lengths}, dilation_rates={pattern.dilation_rates} and "
            f"dilation_block={pattern.branches[0].block} with {heads} heads and head_offsets={pattern.head_offsets!r} "
            f"leave positions of the grid to no head ({first}, ...; {count / _LOOKED_AT:.1%} of the first {_LOOKED_AT:,}): "
            f"they {what}. Give each of a rate's offsets a head (more {whose}, or other head_offsets), or add a window or a "
            "branch of rate 1.",
            UserWarning,
            stacklevel=5,
        )
