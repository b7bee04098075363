"""One block of a LongNet: dilated attention and a feed-forward, each with MAGNETO's sub-LayerNorm (arXiv 2210.06423).

Sub-LayerNorm puts a second norm inside each sublayer, before its output projection:
``x + out_proj(norm(attention(norm(x))))`` and ``x + fc2(norm(gelu(fc1(norm(x)))))`` (section 2.1 and figure 2 there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet.attention import DilatedAttention
from longnet.attention.module import attend_residual
from longnet.attention.streaming import DilatedCache
from longnet.models.config import LongNetConfig
from longnet.nn.norm import make_norm
from longnet.nn.projections import is_as_its_class, project_normed, project_residual
from longnet.runtime.torch_internals import is_differentiated_or_batched


class _Saved(torch.autograd.Function):
    """The identity; its node has x in ``saved_tensors``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class FeedForward(nn.Module):
    """``fc2(sub_norm(gelu(fc1(x))))``, x (B, N, dim) -> (B, N, dim).

    With ``config.feed_forward_chunk`` the hidden layer exists for that many tokens at a time, and the backward pass computes it
    again: for a row of N tokens only x is saved.
    """

    def __init__(
        self, config: LongNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        hidden = config.feed_forward_dim
        self.chunk = config.feed_forward_chunk
        self.fc1 = nn.Linear(config.dim, hidden, bias=config.bias, device=device, dtype=dtype)
        self.sub_norm = make_norm(config.norm, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, config.dim, bias=config.bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        if self.chunk is None:
            return self._inside(x, key_padding_mask)
        # Norms that can be taken in chunks look at no mask.
        parts = x.split(self.chunk, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([self._inside(part) for part in parts], dim=1)
        if x.requires_grad and not torch.compiler.is_compiling() and not is_differentiated_or_batched():
            return self._recomputed(parts)
        return torch.cat([checkpoint(self._inside, part, use_reentrant=False) for part in parts], dim=1)

    def _recomputed(self, parts: Sequence[Tensor]) -> Tensor:
        """The same, with all parts saved before the first is computed.

        A block that is recomputed stops at the last tensor that was saved in it. ``checkpoint`` saves a part where it begins,
        so all parts but the last would be computed on the way there, for nothing.
        """
        kept = [_Saved.apply(part) for part in parts]
        nodes = [part.grad_fn for part in kept]

        def run(place: int) -> Tensor:
            # The part itself is let go in the forward pass, and is None in the backward pass.
            part, kept[place] = kept[place], None
            return self._inside(nodes[place].saved_tensors[0] if part is None else part)

        return torch.cat([checkpoint(run, place, use_reentrant=False) for place in range(len(parts))], dim=1)

    def _inside(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self.finish(self.fc1(x), key_padding_mask)

    def finish(self, hidden: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """What comes after ``fc1``: (B, N, feed_forward_dim) -> (B, N, dim)."""
        return project_normed(self.sub_norm, [self.fc2], hidden, key_padding_mask, gelu=True)[0]


def feed_residual(
    feed_forward: Any, norm: nn.Module, x: Tensor, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x, ``feed_forward(norm(x))``), where x is read again, as in a residual sum."""
    if not is_as_its_class(feed_forward, FeedForward) or feed_forward.chunk is not None:
        masks = () if key_padding_mask is None else (key_padding_mask,)
        return x, feed_forward(norm(x, *masks), *masks)
    x, (hidden,) = project_residual(norm, [feed_forward.fc1], x, key_padding_mask)
    return x, feed_forward.finish(hidden, key_padding_mask)


class Block(nn.Module):
    """Attention and feed-forward with their norms and residual sums, x (B, N, dim) -> (B, N, dim).

    Forward takes ``key_padding_mask`` (B, N) bool, True where the token is padding, for the attention and every norm,
    the ``cache`` of what came before x, if anything did, and ``cu_seqlens`` of documents packed into one row. ``layer`` is the
    block's place in the stack: which heads it has, and what its attention computes.
    """

    def __init__(
        self,
        config: LongNetConfig,
        layer: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.dim, device=device, dtype=dtype)
        layered = config.layer_attention(layer)
        pattern = layered.pattern
        self.attention = DilatedAttention(
            config.dim,
            config.heads,
            pattern.dilation_rates,
            pattern.given_lengths,
            causal=config.causal,
            use_xpos=config.use_xpos and layered.positions,
            use_rel_pos_bias=config.use_rel_pos_bias,
            qk_norm=config.qk_norm,
            kv_heads=config.kv_heads,
            bias=config.bias,
            sub_norm=config.norm,
            head_numbers=config.layer_head_numbers(layer),
            xpos_scale_base=config.xpos_scale_base,
            backend=config.backend,
            **pattern.options,
            segment_offset=layered.segment_offset,
            shift_keys=layered.shift_keys,
            check_coverage=False,
            device=device,
            dtype=dtype,
        )
        self.feed_forward_norm = make_norm(config.norm, config.dim, device=device, dtype=dtype)
        self.feed_forward = FeedForward(config, device=device, dtype=dtype)
        # The attention's own dropout stays 0: one dropout per residual branch, here.
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        cache: DilatedCache | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        options = {"cu_seqlens": cu_seqlens, "cache": cache}
        x, attended = attend_residual(self.attention, self.attention_norm, x, key_padding_mask, options)
        x = x + self.dropout(attended)
        x, fed = feed_residual(self.feed_forward, self.feed_forward_norm, x, key_padding_mask)
        return x + self.dropout(fed)

    @torch.no_grad()
    def reset_parameters(self, layers: int) -> None:
        """MAGNETO's initialisation for a stack of ``layers`` blocks of a decoder-only or encoder-only model.

        Xavier-normal weights; the value and output projections and the feed-forward have the gain
        ``sqrt(log(2 * layers))`` (section 2.2, table 2 there), queries and keys have gain 1; biases are zero.
        """
        gain = math.sqrt(math.log(2 * layers))
        attention, feed_forward = self.attention, self.feed_forward
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and not isinstance(module, (Block, DilatedAttention, nn.Linear)):
                reset()  # norms and the relative bias go back to their own start
        for linear in (attention.q_proj, attention.k_proj):
            _xavier(linear, 1.0)
        for linear in (attention.v_proj, attention.out_proj, feed_forward.fc1, feed_forward.fc2):
            _xavier(linear, gain)
        if attention.absent is not None:
            nn.init.zeros_(attention.absent)


def _xavier(linear: nn.Linear, gain: float) -> None:
    nn.init.xavier_normal_(linear.weight, gain=gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
