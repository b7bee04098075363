"""The layers of the slide encoder: attention, and what happens to each token by itself before it and after it.

Training memory. Under fp16 autocast a layer keeps for the backward pass, in bytes per token and channel: x 4 (the residual
stream is float32), its norm 2, q, k, v 6, the attention's result 2; 14 in all, and 4 bytes per token and head. What comes
after attention (inner norm, output projection, feed-forward) is computed again, in chunks of tokens, from x and the
attention's result. To keep what its matrix products give adds 2 for the output projection and 4 * 2 for ``fc1``; to keep
everything 6 for the inner norm, 4 for x, 4 * (2 + 2 + 4 + 2) for the feed-forward, and dropout's masks, 2; compiled layers keep
the masks always. On a GPU these norms' results are not kept, see :mod:`longnet.nn.projections`: 12 in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longnet.attention import DilatedAttention
from longnet.gigapath.readout import first_token_weights
from longnet.models import LongNetConfig
from longnet.models.layers import Block, feed_residual
from longnet.nn import can_draw, keep_masks
from longnet.nn.norm import PartialNorm
from longnet.nn.projections import is_as_its_class, normalise, project_normed, project_residual

Recompute = Literal["ffn", "block", "elementwise", "none"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)

# Tokens at a time after attention: enough to fill any device, few enough for its widest activations not to count.
_CHUNK = 16_384

Scales = tuple[Tensor | None, Tensor | None]
Masks = tuple[Tensor | None, Tensor | None]
Record = Callable[[Tensor, Tensor], None]


class SlideBlock(Block):
    """A block of the slide encoder: x (B, N, C) -> (B, N, C). All that a pass computes of a layer, it computes by this call.

    Args:
        config, layer, device, dtype: as of :class:`longnet.models.layers.Block`.
        drop_path: probability of leaving out a residual branch of a sample in training.

    Attributes:
        recompute: what the backward pass computes again: ``"ffn"`` all after attention, ``"block"`` all, ``"elementwise"`` what
            is no matrix product, ``"none"`` nothing.
    """

    def __init__(
        self,
        config: LongNetConfig,
        layer: int = 0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype)
        self.drop_path = drop_path
        self.recompute: Recompute = "none"

    def forward(  # type: ignore[override]
        self, x: Tensor, *, rows: Tensor | None = None, times: Tensor | None = None, record: Record | None = None
    ) -> Tensor:
        """The block's result.

        Args:
            rows: (R,) int64, the rows to give, (B, R, C), None for all. The first token of the next layer attends to no others,
                see :func:`longnet.gigapath.readout.read_by_first_token`.
            times: :func:`longnet.gigapath.readout.log_times` of the tokens in x. Row 0 alone is given, (B, 1, C), and x need
                hold no tokens but those that the first one attends to. Only where :func:`gives_first_row`.
            record: called with the query of the first token (B, heads, 1, D) and all keys. Only where :func:`is_separable`.
        """
        scales = self._scales(x)
        if times is not None:
            return self._first_row(x, times, scales, record)
        masks = self._masks(x, x.shape[1] if rows is None else len(rows))
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._rows, x, rows, scales, masks, "none", record, use_reentrant=False)
        return self._rows(x, rows, scales, masks, self.recompute, record)

    def _first_row(self, x: Tensor, times: Tensor, scales: Scales, record: Record | None) -> Tensor:
        attention, y = self.attention, normalise(self.attention_norm, x)
        query, key, value = (
            rows.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)
            for rows in (attention.q_proj(y[:, :1]), attention.k_proj(y), attention.v_proj(y))
        )
        if record is not None:
            record(query, key)
        weights = first_token_weights(query, key, times)
        attended = (weights.to(value.dtype).unsqueeze(2) @ value).transpose(1, 2).flatten(-2)
        return self._after(x[:, :1], attended, scales)

    def _rows(
        self,
        x: Tensor,
        rows: Tensor | None,
        scales: Scales,
        masks: Masks,
        recompute: Recompute,
        record: Record | None = None,
    ) -> Tensor:
        separable = is_separable(self.attention)
        if separable:
            x, attended = self._attend(x, rows is not None, record)
        else:
            attended = self.attention(normalise(self.attention_norm, x))
        if rows is not None:
            x, attended = x.index_select(1, rows), attended.index_select(1, rows)
        after: Callable[..., Tensor] = self._after
        if recompute in ("ffn", "elementwise") and torch.is_grad_enabled():
            options: dict[str, Any] = {} if recompute == "ffn" else {"context_fn": _keep_products}
            # A module may draw numbers that is no dropout of ours.
            random = self.training and not torch.compiler.is_compiling()
            after = partial(checkpoint, self._after, use_reentrant=False, preserve_rng_state=random, **options)
        if torch.compiler.is_compiling():
            # The number of chunks would be part of what is compiled.
            return after(x, attended, scales, masks, separable)
        parts = zip(x.split(_CHUNK, dim=1), attended.split(_CHUNK, dim=1), strict=True)
        outs = [after(*part, scales, masks, separable) for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _attend(self, x: Tensor, some: bool, record: Record | None) -> tuple[Tensor, Tensor]:
        """(x, what the attention's last norm reads, (B, N, C)): a separable attention without what follows it."""
        attention = self.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        x, projected = project_residual(self.attention_norm, projections, x)
        q, k, v = (one.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2) for one in projected)
        if record is not None:
            record(q[:, :, :1], k)
        out = attention.attend(q, k, v, needed_by_first=some and attention.definition.takes_needed_by_first)
        return x, out.transpose(1, 2).flatten(-2)

    def _after(
        self, x: Tensor, attended: Tensor, scales: Scales, masks: Masks = (None, None), separable: bool = True
    ) -> Tensor:
        attention = self.attention
        if separable:
            assert attention.sub_norm is not None
            (attended,) = project_normed(attention.sub_norm, [attention.out_proj], attended)
        branch = self._drop(attended, masks[0])
        x = x + (branch if scales[0] is None else branch * scales[0])
        x, fed = feed_residual(self.feed_forward, self.feed_forward_norm, x)
        branch = self._drop(fed, masks[1])
        return x + (branch if scales[1] is None else branch * scales[1])

    def _masks(self, x: Tensor, tokens: int) -> Masks:
        """Dropout masks (B, tokens, C) of the two branches, True where a number stays; None: each branch draws its own later.

        torch 2.11 cannot compile what is drawn inside of what is computed again: it loses sizes.
        """
        own = torch.compiler.is_compiling() and self.training and is_as_its_class(self.dropout, nn.Dropout)
        if not (own and self.dropout.p > 0):
            return None, None
        shape = (2, x.shape[0], tokens, x.shape[2])
        if can_draw(x.device):
            keep = keep_masks(shape, self.dropout.p, x.device)
        else:
            keep = torch.rand(shape, device=x.device) >= self.dropout.p
        return keep[0], keep[1]

    def _drop(self, branch: Tensor, keep: Tensor | None) -> Tensor:
        """The block's dropout: by the mask ``keep``, or by one that is drawn here."""
        if keep is None:
            dropped: Tensor = self.dropout(branch)
            return dropped
        return branch * keep * (1.0 / (1.0 - self.dropout.p)) if self.dropout.p < 1.0 else branch * 0.0

    def _scales(self, x: Tensor) -> Scales:
        """For each of the two branches 0 or 1 / (1 - p) for every sample, (B, 1, 1); None where nothing is dropped."""
        if self.drop_path == 0.0 or not self.training:
            return None, None
        keep = torch.rand(2, x.shape[0], 1, 1, device=x.device) >= self.drop_path
        first, second = (keep.to(x.dtype) / (1.0 - self.drop_path)).unbind()
        return first, second


def gives_rows(block: nn.Module) -> bool:
    """Whether ``block(x, rows=...)`` gives some rows. What wraps a block, replaces it or has hooks gets ``block(x)``."""
    return is_as_its_class(block, SlideBlock)


def gives_first_row(block: nn.Module) -> bool:
    """Whether ``block(x, times=...)`` gives the first row."""
    return isinstance(block, SlideBlock) and gives_rows(block) and is_separable(block.attention)


def is_separable(attention: Tensor | nn.Module) -> bool:
    """Whether the attention's modules called one by one compute what its own call computes."""
    return (
        isinstance(attention, DilatedAttention)
        and is_as_its_class(attention, DilatedAttention)
        and not attention.causal
        and attention.distributed is False
        and attention.q_norm is None
        and attention.xpos is None
        and attention.rel_pos_bias is None
        and attention.sub_norm is not None
        and not isinstance(attention.sub_norm, PartialNorm)
        and attention.heads == attention.kv_heads
        and is_as_its_class(attention.dropout, nn.Dropout)
        and attention.dropout.p == 0.0
    )


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def _policy(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = partial(create_selective_checkpoint_contexts, _policy)
