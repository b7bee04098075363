"""The CPU backend: torch's own flash attention kernel on strided views of the inputs.

Nothing is gathered. A tile (see :mod:`longnet.geometry.plan`) has four outer axes (batch, segment, offset, head) and
the kernel takes two; the two largest go into one call and the others are looped over. Work is done in blocks of
(batch, heads, tokens), so that accumulators and the kernel's own outputs stay a fraction of the tensors, and in cache.

Traps of ``aten._scaled_dot_product_flash_attention_for_cpu`` that this file guards against: a last-dimension stride
other than 1 gives wrong numbers silently; an empty query kills the process; a row without keys returns lse 0, not
-inf; its backward divides by ``exp(lse)``, which must not be ``exp(-inf)``; its causal forward writes -inf into the
scores before it multiplies them by the scale, which must be above 0 (its backward takes negative ones); its backward
loses all digits where scores are huge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends.cpu_flash.ranges import mix_ranges, range_gradients
from longnet.attention.backends.views import padding_view, repeat_heads, rows_without_keys, signed, sum_heads, tile_view
from longnet.attention.by_offset import backward_by_offset, by_offset
from longnet.attention.call import AttentionInputs, Gradients, SavedForward
from longnet.geometry import Plan, Tile, make_plan
from longnet.geometry.chunks import windows
from longnet.runtime.torch_internals import cpu_flash, cpu_flash_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The kernel's backward pass subtracts a rounded lse from scores that it computes in another order: at ten times this scale a
# float32 gradient is off by about 1e-3, at 1e5 by percents.
LARGEST_SCALE = 100.0

# A block's accumulators aim at this many elements: they then stay in the caches of a core or two while the branches'
# results are mixed into them, and are a fraction of the tensors.
_BLOCK = 1 << 20


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run these inputs, or None when it can."""
    query = inputs.query
    if query.device.type != "cpu":
        return f"it runs on cpu tensors, not {query.device.type}"
    if query.dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, not {query.dtype}"
    if inputs.bias is not None:
        return "torch's CPU flash kernel gives no gradient for a score bias"
    if abs(inputs.spec.scale) > LARGEST_SCALE:
        return f"its gradients lose their digits for scales above {LARGEST_SCALE:g}, not {inputs.spec.scale:g}"
    return None


def _has_tiles(inputs: AttentionInputs) -> bool:
    """Whether there are branches whose queries and keys are the same rows, at equal steps."""
    pattern = inputs.spec.pattern
    return bool(pattern.branches) and pattern.rows_at_equal_steps


def _has_ranges(inputs: AttentionInputs) -> bool:
    """Whether there is anything else."""
    pattern = inputs.spec.pattern
    return pattern.window is not None or not pattern.rows_at_equal_steps


@dataclass(frozen=True)
class _Block:
    """A part of the (batch, heads, tokens) space that no other part shares a key with, and its plan."""

    rows: slice
    heads: slice
    kv_heads: slice
    tokens: slice
    plan: Plan

    def of(self, x: Tensor) -> Tensor:
        """The block's part of a tensor (B, H, N, ...)."""
        return x[self.rows, self.heads, self.tokens]

    def of_kv(self, x: Tensor) -> Tensor:
        """The block's part of a tensor (B, Hk, N, ...)."""
        return x[self.rows, self.kv_heads, self.tokens]


def _blocks(inputs: AttentionInputs) -> Iterator[_Block]:
    """Cut the work into blocks of about ``_BLOCK`` elements, each with a (segment, head) pair for every thread.

    A pair is the backward kernel's unit of parallel work, and one causal pair alone splits badly in the forward kernel.
    """
    if not _has_tiles(inputs):
        return
    batch, heads, length, dim = inputs.query.shape
    group, pattern = inputs.group, inputs.spec.pattern
    shift = inputs.spec.segment_offset
    parts = windows(pattern, length, _BLOCK // dim, shift)
    tokens = max(part.last - part.first for part in parts)
    segments = min(len(branch.starts(tokens)) for branch in pattern.branches)
    head_count = max(_BLOCK // (tokens * dim), -(-torch.get_num_threads() // segments))
    head_count = min(heads, max(group, head_count // group * group))
    batch_count = max(1, min(batch, _BLOCK // (tokens * dim * heads)))
    for row in range(0, batch, batch_count):
        for head in range(0, heads, head_count):
            last = min(heads, head + head_count)
            for part in parts:
                yield _Block(
                    slice(row, min(batch, row + batch_count)),
                    slice(head, last),
                    slice(head // group, last // group),
                    part.tokens,
                    make_plan(part.pattern, heads, part.last - part.first, head, last, shift + part.first),
                )


# Into the (batch, segment, offset, head) axes of a tile.
_Index = tuple[Any, ...]


@lru_cache(maxsize=4096)
def _calls(tile: Tile, batch: int) -> tuple[_Index, ...]:
    """Kernel calls that cover a tile: indices into its (batch, segment, offset, head) axes that leave two of them."""
    sizes = (batch, *tile.shape[:3])
    looped = sorted(range(4), key=sizes.__getitem__)[:2]
    calls = []
    for chosen in itertools.product(*(range(sizes[axis]) for axis in looped)):
        index: list[Any] = [slice(None)] * 4
        for axis, value in zip(looped, chosen, strict=True):
            index[axis] = value
        calls.append(tuple(index))
    return tuple(calls)


class _Padding:
    """A block's padding mask as the kernel wants it: an additive bias per tile, and the rows that see no key."""

    def __init__(self, padding: Tensor, dtype: torch.dtype, is_causal: bool) -> None:
        self.mask = padding
        self.bias = torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, -torch.inf)
        self.is_causal = is_causal
        self._empty: dict[Tile, Tensor] = {}

    def call(self, tile: Tile, index: _Index) -> Tensor:
        shape = (self.mask.shape[0], *tile.shape)
        view = padding_view(self.bias, tile).expand(shape)[index]
        # One row of keys for all queries: (a, b, 1, rows).
        return view.unsqueeze(-2)

    def empty_rows(self, tile: Tile, index: _Index) -> Tensor:
        if tile not in self._empty:
            empty = rows_without_keys(padding_view(self.mask, tile), self.is_causal)
            self._empty[tile] = empty.expand(self.mask.shape[0], *tile.shape)
        return self._empty[tile][index]


def _dense(x: Tensor) -> Tensor:
    """A block with every head's rows next to each other.

    The kernel needs the last stride to be 1. Rows far apart (a (B, N, H, D) layout) it would take, but reads them up to
    a fifth slower, in every branch again; one copy of a block is cheaper.
    """
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


def _rows(block: _Block, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, _Padding | None]:
    """A block's q, k and v, all by query head, and its padding mask."""
    masks = None
    if inputs.mask is not None:
        masks = _Padding(inputs.mask[block.rows, block.tokens], inputs.query.dtype, inputs.spec.is_causal)
    k, v = (repeat_heads(_dense(block.of_kv(x)), inputs.group) for x in (inputs.key, inputs.value))
    if masks is not None:
        # Whatever a padded key or value holds (a NaN, say) must not reach 0 * value.
        k, v = (x.masked_fill(masks.mask[:, None, :, None], 0.0) for x in (k, v))
    return _dense(block.of(inputs.query)), k, v, masks


@by_offset
def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """out like the query, and lse (B, H, N)."""
    out, lse = inputs.empty_outputs()
    spec = inputs.spec
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    if not _has_tiles(inputs):
        out.zero_()
        lse.fill_(-torch.inf)
    for block in _blocks(inputs):
        q, k, v, masks = _rows(block, inputs)
        # The kernel takes a scale above 0, so its sign goes into the query.
        tensors, scale = (signed(q, spec.scale), k, v), abs(spec.scale) or 1.0
        parts = _parts(cpu_flash, tensors, masks, block.plan, spec.is_causal, scale)
        _mix(block.of(out), block.of(lse), parts, masks)
        # Before the next block makes its own: a second set would be the peak.
        del parts
    if _has_ranges(inputs):
        mix_ranges(inputs, out, lse)
    return out, lse


# Whether a part may assign (the others mix or add), its tile and index, and what the kernel gave.
_Part = tuple[bool, Tile, _Index, tuple[Tensor, ...]]


def _parts(
    kernel: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    masks: _Padding | None,
    plan: Plan,
    is_causal: bool,
    scale: float,
) -> list[_Part]:
    """The kernel's results for all calls of a block. Parts of a first branch that covers everything may assign."""
    parts = []
    for number, branch in enumerate(plan.branches):
        assign = number == 0 and branch.covers_all
        for tile in branch.tiles:
            views = [tile_view(x, tile) for x in tensors]
            for index in _calls(tile, views[0].shape[0]):
                mask = None if masks is None else masks.call(tile, index)
                results = kernel(*(view[index] for view in views), 0.0, is_causal, attn_mask=mask, scale=scale)
                parts.append((assign, tile, index, results))
    return parts


def _mix(out: Tensor, lse: Tensor, parts: list[_Part], masks: _Padding | None) -> None:
    """Mix the parts into a block's results, which may hold anything before.

    After all kernel calls, not between them: the results then stay in cache while they are touched. They are their own
    accumulators: a float32 copy of half precision rows costs a twentieth of the time, and buys no measurable accuracy.
    """
    if not (parts and parts[0][0]):
        out.zero_()
        lse.fill_(-torch.inf)
    for assign, tile, index, (part, part_lse) in parts:
        out_rows, lse_rows = tile_view(out, tile)[index], tile_view(lse, tile)[index]
        if masks is not None:
            part_lse = part_lse.masked_fill(masks.empty_rows(tile, index), -torch.inf)
        if assign:
            out_rows.copy_(part)
            lse_rows.copy_(part_lse)
        else:
            merge.merge_(out_rows, lse_rows, part, part_lse)


@backward_by_offset
def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Exact gradients of the joint softmax: every branch's backward with the merged out and lse, added up."""
    inputs, grads = saved.inputs, saved.inputs.empty_gradients()
    if inputs.query.numel() == 0:
        return grads.zeroed()
    group, dim, spec = inputs.group, inputs.query.shape[-1], inputs.spec
    for block in _blocks(inputs):
        q, k, v, masks = _rows(block, inputs)
        grad_o, o = _dense(block.of(grad_out)), _dense(block.of(saved.out))
        grad_l = None if grad_lse is None else block.of(grad_lse)
        q, o, lse = merge.rows_for_backward(grad_o, grad_l, q, o, block.of(saved.lse))
        if grad_l is not None:
            grad_o, q, k, v, o = merge.fold_lse_gradient(grad_o, q, k, v, o, grad_l)
        parts = _parts(cpu_flash_backward, (grad_o, q, k, v, o, lse), masks, block.plan, spec.is_causal, spec.scale)
        for which, shared in enumerate((1, group, group)):
            target = block.of(grads[which]) if which == 0 else block.of_kv(grads[which])
            # Where the gradient can hold the accumulator's precision and shape, it is the accumulator.
            in_place = shared == 1 and grad_lse is None and target.dtype == lse.dtype
            total = target if in_place else torch.empty_like(q, dtype=lse.dtype)
            _add_up(total, parts, which)
            if not in_place:
                target.copy_(sum_heads(total[..., :dim], shared))
        # Before the next block makes its own: a second set would be the peak.
        del parts
    if _has_ranges(inputs):
        tiles = _has_tiles(inputs)
        query, out, lse = merge.rows_for_backward(grad_out, grad_lse, inputs.query, saved.out, saved.lse)
        found = range_gradients(inputs, query, out, lse, grad_out, grad_lse)
        for grad, own, shared in zip(grads[:3], found, (1, group, group), strict=True):
            own = sum_heads(own, shared)
            grad.copy_(grad + own if tiles else own)
    return grads


def _add_up(total: Tensor, parts: list[_Part], which: int) -> None:
    """Add the parts' gradients of one tensor up in a block's accumulator, which may hold anything before."""
    if not (parts and parts[0][0]):
        total.zero_()
    for assign, tile, index, gradients in parts:
        rows = tile_view(total, tile)[index]
        if assign:
            rows.copy_(gradients[which])
        else:
            rows.add_(gradients[which])
