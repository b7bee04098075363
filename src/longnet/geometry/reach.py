"""The receptive field of stacked layers, alike or of several kinds.

Source: LongNet, arXiv 2307.02486, section 2.3 (the attentive field grows exponentially). Integers and fractions only; sets of
positions are Python integers, bit ``p`` for position ``p``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from longnet.checks import check_int, check_ints
from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch

LONGEST_REACH = 1 << 20
# Short segments are followed in parts of about this many tokens: shifts of longer integers take longer.
_PART = 1 << 14

# Offsets that some head has, rising.
Offsets = tuple[int, ...]


@dataclass(frozen=True)
class LayerAttention:
    """What one layer of a stack computes.

    Attributes:
        pattern: of the heads that the layer has.
        heads: how many they are.
        segment_offset: on the grid position ``p`` counts as ``p + segment_offset``.
        shift_keys: a key also holds channels of the token before, see :func:`longnet.nn.shift_keys.shift_keys`.
        positions: False in a layer that does not rotate queries and keys by position where other layers of the model do.
    """

    pattern: Pattern
    heads: int
    segment_offset: int = 0
    shift_keys: bool = False
    positions: bool = True


@dataclass(frozen=True)
class LayerReach:
    """What a position depends on after ``layer`` layers: ``tokens`` of the ``visible`` ones, itself included."""

    layer: int
    tokens: int
    visible: int
    farthest: int

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.tokens, self.visible)


def offsets_taken(pattern: Pattern, branch: Branch, heads: int) -> Offsets:
    """Which of the branch's ``r`` offsets some head has, rising."""
    return tuple(sorted({pattern.offset(branch, head, heads) for head in range(heads)}))


def reach(
    pattern: Pattern,
    heads: int,
    length: int,
    layers: int,
    is_causal: bool = False,
    position: int | None = None,
    *,
    segment_offset: int = 0,
) -> tuple[int, tuple[int, ...]]:
    """The set of positions that ``position`` depends on after 0, 1, ..., ``layers`` layers.

    Heads mix between layers, so a layer reaches the union over its heads; the residual stream keeps the position.

    Returns:
        ``(start, masks)``: bit ``b`` of ``masks[l]`` is set when position ``start + b`` is reached after ``l`` layers.

    Raises:
        TypeError, ValueError: numbers out of range, or more than ``LONGEST_REACH`` tokens to follow.
    """
    check_ints(1, heads=heads, layers=layers)
    return stack_reach([LayerAttention(pattern, heads, segment_offset)] * layers, length, is_causal, position)


def stack_reach(
    layers: Sequence[LayerAttention], length: int, is_causal: bool = False, position: int | None = None
) -> tuple[int, tuple[int, ...]]:
    """As :func:`reach`, of layers that may differ, the first one first: ``masks[l]`` is of the first ``l`` layers."""
    check_int("length", length, 1)
    for layer in layers:
        check_int("segment_offset", layer.segment_offset)
    position = length - 1 if position is None else check_int("position", position)
    if not 0 <= position < length:
        raise ValueError(f"position={position} is outside the sequence: expected 0 <= position < length={length}")
    kinds = list(dict.fromkeys(layers))
    start, stop = _visible(kinds, length, is_causal, position)
    if stop - start > LONGEST_REACH:
        raise ValueError(f"length={length} asks to follow {stop - start} tokens: expected at most {LONGEST_REACH}")
    # What the position depends on is followed from the last layer down, so stacks that end alike share the work.
    followed: dict[tuple[int, ...], int] = {(): 1 << (position - start)}
    masks, upwards = [followed[()]], [kinds.index(layer) for layer in layers]
    for depth in range(1, len(layers) + 1):
        downwards = tuple(reversed(upwards[:depth]))
        for count in range(1, depth + 1):
            path = downwards[:count]
            if path not in followed:
                followed[path] = _before(kinds[path[-1]], followed[path[:-1]], start, stop - start, is_causal)
        masks.append(followed[downwards])
    return start, tuple(masks)


def receptive_field(
    pattern: Pattern,
    heads: int,
    length: int,
    layers: int,
    is_causal: bool = False,
    position: int | None = None,
    *,
    segment_offset: int = 0,
) -> tuple[LayerReach, ...]:
    """How far ``position`` (the last one by default) sees after 1, 2, ..., ``layers`` layers. Exact.

    Args:
        pattern, heads, length: as in :func:`coverage`, with a length.
        layers: attention layers stacked.
        is_causal: keys after the query are left out; the visible tokens are then those up to ``position``.
        position: whose receptive field; the last position when None.
        segment_offset: on the grid position ``p`` counts as ``p + segment_offset``.

    Returns:
        One :class:`LayerReach` per layer: tokens reached (itself included) and the farthest distance in tokens.

    Raises:
        TypeError, ValueError: as in :func:`reach`.
    """
    check_ints(1, heads=heads, layers=layers)
    return stack_receptive_field([LayerAttention(pattern, heads, segment_offset)] * layers, length, is_causal, position)


def stack_receptive_field(
    layers: Sequence[LayerAttention], length: int, is_causal: bool = False, position: int | None = None
) -> tuple[LayerReach, ...]:
    """As :func:`receptive_field`, of layers that may differ, the first one first."""
    start, masks = stack_reach(layers, length, is_causal, position)
    local = masks[0].bit_length() - 1
    visible = start + local + 1 if is_causal else length
    layers_reached = []
    for layer, mask in enumerate(masks[1:], 1):
        lowest, highest = (mask & -mask).bit_length() - 1, mask.bit_length() - 1
        layers_reached.append(LayerReach(layer, mask.bit_count(), visible, max(local - lowest, highest - local)))
    return tuple(layers_reached)


def uncovered_by_stack(layers: Sequence[LayerAttention], length: int) -> int:
    """The set of positions below ``length`` that no head of any layer reads as a key, or that none serves as a query."""
    check_int("length", length, 1)
    everything = (1 << length) - 1
    keys = queries = 0
    for layer in set(layers):
        pattern = layer.pattern
        if pattern.window is not None:
            return 0
        for branch in pattern.branches:
            origin, selected = branch.origin(layer.segment_offset), 0
            for start, segments, tokens in branch.spans(length, origin):
                for offset in offsets_taken(pattern, branch, layer.heads):
                    members = _members(branch, offset, tokens, start - branch.segment_start(start))
                    selected |= repeat_bits(members, tokens, segments * tokens) << (start - origin)
            keys |= selected
            queries |= selected if pattern.dilated_queries else everything
    return everything & ~(keys & queries)


def repeat_bits(bits: int, every: int, size: int) -> int:
    """``bits`` at 0, every, 2 * every, ... in a mask of ``size`` bits."""
    while every < size:
        bits |= bits << every
        every *= 2
    return bits & ((1 << max(0, size)) - 1)


def _visible(kinds: Sequence[LayerAttention], length: int, is_causal: bool, position: int) -> tuple[int, int]:
    """Positions from the first to the last, and one more, outside of which nothing is reached."""
    if len(kinds) != 1:
        return 0, position + 1 if is_causal else length
    (layer,) = kinds
    start, period = layer.pattern.window_start(position, layer.segment_offset), layer.pattern.closed_period
    if layer.shift_keys:
        start, period = 0, None
    if is_causal:
        return start, position + 1
    stop = length if period is None else position + period - (position + layer.segment_offset) % period
    return start, min(stop, length)


def _before(layer: LayerAttention, reached: int, start: int, size: int, is_causal: bool) -> int:
    """What the ``reached`` positions depend on before a layer: themselves and the keys that they read."""
    pattern, keys = layer.pattern, 0
    if pattern.window is not None:
        keys = _smear(reached, min(pattern.window, size), size, is_causal)
    for branch in pattern.branches:
        offsets = offsets_taken(pattern, branch, layer.heads)
        origin = branch.origin(start + layer.segment_offset)
        for first, segments, tokens in branch.spans(size, origin):
            classes = [_members(branch, offset, tokens, first - branch.segment_start(first)) for offset in offsets]
            own = reached >> (first - origin) & ((1 << segments * tokens) - 1)
            keys |= _step(own, classes, segments, tokens, is_causal, pattern.dilated_queries) << (first - origin)
    if layer.shift_keys:
        keys |= keys >> 1
    return reached | keys


def _smear(reached: int, window: int, size: int, is_causal: bool) -> int:
    """Positions at distances below ``window`` of a reached one, not after it when causal."""
    below = above = reached
    done = 1
    while done < window:
        more = min(done, window - done)
        below, above = below | below >> more, above | above << more
        done += more
    return below if is_causal else (below | above) & ((1 << size) - 1)


def _step(
    reached: int, classes: Sequence[int], segments: int, width: int, is_causal: bool, dilated_queries: bool
) -> int:
    """The keys of every reached query in ``segments`` of ``width`` tokens, not after it if causal.

    ``classes`` are the positions of a segment that the heads of one offset select.
    """
    ones, part = (1 << width) - 1, max(1, _PART // width)
    keys = 0
    for first in range(0, segments, part):
        queries_of_part, keys_of_part = reached >> first * width & ((1 << part * width) - 1), 0
        for segment in range(part if queries_of_part else 0):
            queries, in_segment = queries_of_part >> segment * width & ones, 0
            for members in classes:
                own = queries & members if dilated_queries else queries
                if own:
                    in_segment |= members & ((1 << own.bit_length()) - 1) if is_causal else members
            keys_of_part |= in_segment << segment * width
        keys |= keys_of_part << first * width
    return keys


def _members(branch: Branch, offset: int, width: int, first: int) -> int:
    """Which of ``width`` positions of a segment, from its position ``first`` on, a head with this offset selects."""
    block, cycle = branch.block, branch.dilation_rate * branch.block
    # Position i is the place (i + into) mod cycle of a block that is selected and of those that are not.
    into = (first - offset * block) % cycle
    ones, next_block = (1 << width) - 1, cycle - into
    begun = (1 << min(block - into, width)) - 1 if into < block else 0
    if next_block >= width:
        return begun
    return (begun | repeat_bits((1 << min(block, width)) - 1, cycle, width - next_block) << next_block) & ones
