"""Attention as torchscale computes it, for the checkpoints that were trained with it.

It differs from the definition of this library in its zero padding, see :mod:`longnet.geometry.phantoms`. Forward, branches
whose outputs stay in place are one ordinary call, and phantom keys one number added to each denominator. A branch whose outputs
are shifted is run by itself on segments that are really padded, and mixed in. Backward, every part runs with the merged out and
lse (the rule of :mod:`longnet.mixing`), so phantoms, which are constants, need nothing more. torchscale itself takes the
mixing weights for constants; gradients here are those of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet import mixing
from longnet.backends import BACKENDS, Backend, Spec, select_backend
from longnet.backends.kept import Kept
from longnet.backends.operators import lse_dtype, register_operators
from longnet.functional import check_call
from longnet.fused import fade_
from longnet.geometry import Branch, Pattern
from longnet.geometry.phantoms import padded_length, phantom_runs, split_shifted
from longnet.geometry.wanted import read_by_first as rows_read_by_first

# The lse of rows that are not there: every probability in them is 0.
_FAR = 1e6


def torchscale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What torchscale's ``DilatedAttention`` computes between its projections; arguments of :func:`longnet.dilated_attention`.

    Head offsets are blocked. Without ``is_causal`` each segment's padding up to a multiple of r, and the last one's up to
    ``min(w, N)``, are keys of score 0 and value 0. Where w is no multiple of r and N > w, segment i's outputs land ``i * pad``
    positions later, and rows of padding write the mean over the slots, with lse ``log(slots)``.

    Args:
        key_padding_mask: (B, N) bool, True where a token is absent: the others get what a call without it would give,
            absent ones 0 and lse -inf. The present tokens of each row are brought to its front, so N is then their number.

    Returns, Raises: as :func:`longnet.dilated_attention`.
    """
    return torchscale_pattern_attention(
        query,
        key,
        value,
        Pattern.parse(segment_lengths, dilation_rates, "blocked"),
        is_causal=is_causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        return_lse=return_lse,
        backend=backend,
    )


def torchscale_pattern_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    group: Any = None,
    read_by_first: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torchscale_attention` for a parsed pattern; it takes the place of ``longnet.functional.pattern_attention``.

    Args:
        read_by_first: give the rows alone that the first token attends to in some head, see
            :func:`longnet.geometry.wanted.read_by_first`; the others are 0, have lse inf and no gradient. Not causal.

    Raises:
        ValueError: also for documents, a relative bias or a group: torchscale's attention has no such things.
    """
    if read_by_first and (is_causal or key_padding_mask is not None):
        raise ValueError("read_by_first=True with is_causal or a key_padding_mask: expected neither")
    for name, given in (("cu_seqlens", cu_seqlens), ("distance_bias", distance_bias), ("group", group)):
        if given is not None:
            raise ValueError(f"{name} given with torchscale's attention, which has none: expected None")
    query, key, value, scale = check_call(
        query, key, value, key_padding_mask, None, pattern, is_causal, scale, return_lse
    )
    chosen = select_backend(backend, query.device.type, query.dtype, query.shape[-1], False)
    spec = Spec(pattern, is_causal, scale, read_by_first)
    if key_padding_mask is None:
        out, lse = _RUN[chosen.name](query, key, value, None, None, spec)
    else:
        out, lse = _each_alone(query, key, value, key_padding_mask, spec, chosen)
    return (out, lse) if return_lse else out


def _each_alone(
    query: Tensor, key: Tensor, value: Tensor, absent: Tensor, spec: Spec, backend: Backend
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for row in range(query.shape[0]):
        present = (~absent[row]).nonzero().squeeze(1)
        alone = (x[row : row + 1].index_select(2, present) for x in (query, key, value))
        out, lse = _RUN[backend.name](*alone, None, None, spec)
        outs.append(torch.zeros_like(query[row : row + 1]).index_copy(2, present, out))
        nothing = lse.new_full((1, *query.shape[1:3]), -torch.inf)
        lses.append(nothing.index_copy(2, present, lse))
    if not outs:
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=lse_dtype(query.dtype))
    return torch.cat(outs), torch.cat(lses)


def _forward(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, padding: None, bias: None, spec: Spec
) -> tuple[Tensor, Tensor]:
    in_place, shifted = split_shifted(spec.pattern, query.shape[2])
    if in_place is not None:
        out, lse = backend.forward(query, key, value, None, None, _in_place_spec(spec, in_place, shifted))
        shape = (query.shape[1], query.shape[2], query.device, lse.dtype)
        phantoms = None if spec.is_causal else _log_phantoms(in_place, *shape)
        if phantoms is not None:
            lse = fade_(out, lse, phantoms)
    else:
        out = torch.zeros_like(query)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=lse_dtype(query.dtype))
    for branch in shifted:
        q, k, v = (_pad_segments(x, branch) for x in (query, key, value))
        branch_out, branch_lse = backend.forward(q, k, v, None, None, _padded_spec(spec, branch))
        mixing.merge_(out, lse, branch_out[:, :, : query.shape[2]], branch_lse[:, :, : query.shape[2]])
    if spec.read_by_first:
        unread = _unread(spec.pattern, query.shape[1], query.shape[2], query.device)
        out.masked_fill_(unread[:, None], 0.0)
        # Every probability in these rows is 0 in the backward pass.
        lse.masked_fill_(unread, torch.inf)
    return out, lse


def _backward(
    backend: Backend,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: None,
    bias: None,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = query.shape[2]
    in_place, shifted = split_shifted(spec.pattern, length)
    if in_place is not None:
        saved = (grad_out, grad_lse, query, key, value, None, None, out, lse)
        *grads, _ = backend.backward(*saved, _in_place_spec(spec, in_place, shifted))
    else:
        grads = [torch.zeros_like(x) for x in (query, key, value)]
    for branch in shifted:
        inputs = [_pad_segments(x, branch) for x in (query, key, value)]
        # Rows past the end are computed and not seen.
        more = inputs[0].shape[2] - length
        rows = (F.pad(grad_out, (0, 0, 0, more)), None if grad_lse is None else F.pad(grad_lse, (0, more)))
        mixed = (F.pad(out, (0, 0, 0, more)), F.pad(lse, (0, more), value=_FAR))
        *found, _ = backend.backward(*rows, *inputs, None, None, *mixed, _padded_spec(spec, branch))
        for grad, x in zip(grads, found, strict=True):
            grad += _cut_segments(x, branch, length)
    return grads[0], grads[1], grads[2], query.new_empty(0)


# One pair of operators for every backend.
_RUN = {
    one.name: register_operators(f"torchscale_{one.name}", partial(_forward, one), partial(_backward, one))[0]
    for one in BACKENDS
}


def _in_place_spec(spec: Spec, in_place: Pattern, shifted: Sequence[Branch]) -> Spec:
    # What the first token attends to in shifted branches too, these branches by themselves do not tell.
    return replace(spec, pattern=in_place, read_by_first=spec.read_by_first and not shifted)


def _padded_spec(spec: Spec, branch: Branch) -> Spec:
    padded = Branch(padded_length(branch), branch.dilation_rate)
    return replace(spec, pattern=replace(spec.pattern, branches=(padded,)), read_by_first=False)


def _pad_segments(x: Tensor, branch: Branch) -> Tensor:
    """(B, H, N, D) to segments padded with zeros, one after the other."""
    width = branch.segment_length
    whole = F.pad(x, (0, 0, 0, -x.shape[2] % width)).unflatten(2, (-1, width))
    return F.pad(whole, (0, 0, 0, padded_length(branch) - width)).flatten(2, 3)


def _cut_segments(x: Tensor, branch: Branch, length: int) -> Tensor:
    """The transpose of :func:`_pad_segments`."""
    segments = x.unflatten(2, (-1, padded_length(branch)))
    return segments[:, :, :, : branch.segment_length].flatten(2, 3)[:, :, :length]


# One length is in use at a time, by all layers of a model; a table of a million tokens takes 64 MB.
_PHANTOMS, _UNREAD = Kept(2), Kept(2)


def _log_phantoms(pattern: Pattern, heads: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Log of the number of phantoms in each denominator, (H, N), or None where there are none at all."""
    runs = phantom_runs(pattern, heads, length)
    if not runs:
        return None

    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            count = torch.zeros(heads, length, device=device, dtype=dtype)
            for run in runs:
                count[run.first_head : run.last_head, run.start :: run.step] += run.count
            return count.log_()

    return _PHANTOMS.get((pattern, heads, length, device, dtype), device, make)


def _unread(pattern: Pattern, heads: int, length: int, device: torch.device) -> Tensor:
    """Which rows nobody reads where :class:`Spec` says ``read_by_first``, (N,) bool."""

    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            unread = torch.ones(length, dtype=torch.bool)
            for end, step in rows_read_by_first(pattern, heads, length).runs:
                unread[:end:step] = False
            return unread.to(device)

    return _UNREAD.get((pattern, heads, length, device), device, make)
