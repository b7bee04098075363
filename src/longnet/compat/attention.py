"""Attention as torchscale computes it, for the checkpoints that were trained with it.

It differs from the definition of this library in its zero padding, see :mod:`longnet.geometry.phantoms`. Forward, branches
whose outputs stay in place are one ordinary call, and phantom keys one number added to each denominator. A branch whose outputs
are shifted is run by itself on segments that are really padded, and mixed in. Backward, every part runs with the merged out and
lse (the rule of :mod:`longnet.attention.merge`), so phantoms, which are constants, need nothing more. torchscale itself takes the
mixing weights for constants; gradients here are those of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.attention import merge
from longnet.attention.backends import BACKENDS, VARIANTS, Backend
from longnet.attention.call import AttentionInputs, Gradients, SavedForward
from longnet.attention.definition import AttentionDefinition
from longnet.attention.functional import pattern_attention
from longnet.attention.operators import register_attention
from longnet.attention.sharding import Peers
from longnet.geometry import Branch, Pattern
from longnet.geometry.needed_rows import needed_by_first as rows_needed_by_first
from longnet.geometry.phantoms import padded_length, phantom_runs, split_shifted
from longnet.nn import rescale_
from longnet.runtime.cache import GraphSafeCache

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
    return pattern_attention(
        query,
        key,
        value,
        Pattern.parse(segment_lengths, dilation_rates, "blocked"),
        is_causal=is_causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        return_lse=return_lse,
        backend=backend,
        definition=TORCHSCALE,
    )


def _run(inputs: AttentionInputs, backend: Backend, peers: Peers | None) -> tuple[Tensor, Tensor]:
    run = _RUN[backend.name]
    return run(inputs) if inputs.mask is None else _each_alone(inputs, inputs.mask, run)


TORCHSCALE = AttentionDefinition("torchscale's attention", _run, takes_all_options=False, takes_needed_by_first=True)


def _each_alone(
    inputs: AttentionInputs, absent: Tensor, run: Callable[[AttentionInputs], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    query, outs, lses = inputs.query, [], []
    for row in range(query.shape[0]):
        present = (~absent[row]).nonzero().squeeze(1)
        q, k, v = (x[row : row + 1].index_select(2, present) for x in (query, inputs.key, inputs.value))
        out, lse = run(AttentionInputs(q, k, v, None, None, inputs.spec))
        outs.append(torch.zeros_like(query[row : row + 1]).index_copy(2, present, out))
        nothing = lse.new_full((1, *query.shape[1:3]), -torch.inf)
        lses.append(nothing.index_copy(2, present, lse))
    return (torch.cat(outs), torch.cat(lses)) if outs else inputs.empty_outputs()


def _forward(backend: Backend, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    query, spec = inputs.query, inputs.spec
    in_place, shifted = split_shifted(spec.pattern, query.shape[2])
    if in_place is not None:
        out, lse = backend.kernels.forward(_in_place(inputs, in_place, shifted))
        shape = (query.shape[1], query.shape[2], query.device, lse.dtype)
        phantoms = None if spec.is_causal else _log_phantoms(in_place, *shape)
        if phantoms is not None:
            lse = rescale_(out, lse, phantoms)
    else:
        out, lse = inputs.empty_outputs()
        out.zero_()
        lse.fill_(-torch.inf)
    for branch in shifted:
        branch_out, branch_lse = backend.kernels.forward(_padded(inputs, branch))
        merge.merge_(out, lse, branch_out[:, :, : query.shape[2]], branch_lse[:, :, : query.shape[2]])
    if spec.needed_by_first:
        unread = _unread(spec.pattern, query.shape[1], query.shape[2], query.device)
        out.masked_fill_(unread[:, None], 0.0)
        # Every probability in these rows is 0 in the backward pass.
        lse.masked_fill_(unread, torch.inf)
    return out, lse


def _backward(backend: Backend, saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    inputs, length = saved.inputs, saved.inputs.length
    in_place, shifted = split_shifted(inputs.spec.pattern, length)
    if in_place is not None:
        grads = backend.kernels.backward(
            replace(saved, inputs=_in_place(inputs, in_place, shifted)), grad_out, grad_lse
        )
    else:
        grads = inputs.empty_gradients().zeroed()
    for branch in shifted:
        padded = _padded(inputs, branch)
        # Rows past the end are computed and not seen.
        more = padded.length - length
        rows = (F.pad(grad_out, (0, 0, 0, more)), None if grad_lse is None else F.pad(grad_lse, (0, more)))
        mixed = (F.pad(saved.out, (0, 0, 0, more)), F.pad(saved.lse, (0, more), value=_FAR))
        branch_grads = backend.kernels.backward(SavedForward(padded, *mixed), *rows)
        for grad, x in zip(grads[:3], branch_grads, strict=False):
            grad += _cut_segments(x, branch, length)
    return grads


# One pair of operators for every backend.
_RUN = {
    one.name: register_attention(
        f"torchscale_{one.name}".replace(":", "_"), partial(_forward, one), partial(_backward, one)
    ).run
    for one in (*BACKENDS, *VARIANTS)
}


def _in_place(inputs: AttentionInputs, in_place: Pattern, shifted: Sequence[Branch]) -> AttentionInputs:
    # What the first token attends to in shifted branches too, these branches by themselves do not tell.
    return inputs.with_spec(pattern=in_place, needed_by_first=inputs.spec.needed_by_first and not shifted)


def _padded(inputs: AttentionInputs, branch: Branch) -> AttentionInputs:
    """The call of one branch on segments that are really padded."""
    query, key, value = (_pad_segments(x, branch) for x in (inputs.query, inputs.key, inputs.value))
    pattern = inputs.spec.pattern.of(Branch(padded_length(branch), branch.dilation_rate))
    spec = replace(inputs.spec, pattern=pattern, needed_by_first=False)
    return AttentionInputs(query, key, value, None, None, spec)


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
_PHANTOMS, _UNREAD = GraphSafeCache(2), GraphSafeCache(2)


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
    """Which rows are not needed under ``needed_by_first`` of :class:`longnet.attention.call.AttentionSpec`, (N,) bool."""

    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            unread = torch.ones(length, dtype=torch.bool)
            for end, step in rows_needed_by_first(pattern, heads, length).runs:
                unread[:end:step] = False
            return unread.to(device)

    return _UNREAD.get((pattern, heads, length, device), device, make)
