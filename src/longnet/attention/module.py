"""The module: projections, positions and dropout around ``dilated_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.call import check_segment_offset
from longnet.attention.definition import LONGNET, AttentionDefinition, warn_uncovered
from longnet.attention.functional import pattern_attention
from longnet.attention.module_checks import check_sizes, check_sub_norm, checked_offset, parse_pattern
from longnet.attention.packed import boundaries, by_token, positions
from longnet.attention.padding import warn_left_padding
from longnet.attention.sharding import group_of, peers_of, row_before, shard_place
from longnet.attention.streaming import DilatedCache, stream_attention_warned
from longnet.checks import check_flags, check_ints
from longnet.compat.spellings import accept_spellings
from longnet.geometry import HeadOffsets
from longnet.nn.norm import PartialNorm, make_norm, make_sub_norm
from longnet.nn.position import Positions, RelativeBias, XPos
from longnet.nn.projections import is_as_its_class, project_normed, project_residual
from longnet.nn.shift_keys import second_half, shift_keys


class DilatedAttention(nn.Module):
    """Multi-head dilated self-attention, (B, N, dim) to (B, N, dim).

    Source: LongNet, arXiv 2307.02486, section 2. Splits the sequence into segments, keeps every r-th row of each (another
    offset for each head), attends within them, scatters back, and mixes the branches by their softmax denominators.

    Args:
        dim: channels, divisible by ``heads``.
        heads: H query heads.
        dilation_rate: r, an int or one per branch.
        segment_size: w in tokens, an int or one per branch (a mixture). None: the whole sequence is one segment. With a
            ``window`` there may be no branch: ``()``.
        dropout: probability, applied to the attention output before ``out_proj``; off in eval mode.
        causal: tokens see only earlier tokens and themselves. ``casual`` is an accepted spelling.
        use_xpos: rotate and scale q and k by position (arXiv 2212.10554); the head dimension must be even.
        use_rel_pos_bias: add T5's learned bias by token distance to the scores.
        distributed: the ranks that share one sequence: True for the default process group, or a ``ProcessGroup`` or a
            ``DeviceMesh`` of one dimension. Every rank then passes its contiguous shard, in rank order, and positions are
            those of the whole sequence. May be set later, see ``longnet.distributed.parallelize``. ``Distributed`` is an
            accepted spelling.
        qk_norm: RMS-normalise q and k over each head's channels.
        kv_heads: Hk key/value heads (grouped-query attention), divides ``heads``. Default ``heads``.
        bias: of the projections.
        sub_norm: MAGNETO's norm between attention and ``out_proj`` (arXiv 2210.06423): None, "layer", "rms" or "batch".
        head_offsets: ``"interleaved"`` (the paper), ``"blocked"`` (torchscale's checkpoints) or ``"grouped"`` (heads of one
            key/value head select the same rows).
        head_numbers: which of the ``heads`` there are, None for all: others were pruned (see ``longnet.compress``), with whole
            key/value heads. These keep their offsets, D stays ``dim / heads``, and a ``sub_norm`` ("layer" or "rms") takes its
            statistics as if the others gave zeros. The attributes ``heads`` and ``kv_heads`` count those that are left.
        xpos_scale_base: tokens, see :class:`longnet.nn.position.XPos`.
        rel_pos_buckets, rel_pos_max_distance: see :class:`longnet.nn.position.RelativeBias`.
        backend, window, dilated_queries, dilation_block: as in :func:`longnet.dilated_attention`.
        segment_offset: as there, an int; a call may have another one.
        shift_keys: after any norm and before xPos each key gets the second half of its channels from the token before, see
            :func:`longnet.nn.shift_keys.shift_keys`.
        check_coverage: warn of positions that no head covers; False where other layers of a model cover them.
        device, dtype: of the parameters.

    Attributes:
        definition: which attention it computes, the paper's or another one; may be set, see :mod:`longnet.compat`.

    Raises:
        TypeError: a number or flag of the wrong type. ValueError: any other bad value; both name the argument.
    """

    definition: AttentionDefinition = LONGNET
    segment_offset = 0
    shift_keys = False
    _mask_seen = False

    @accept_spellings(casual="causal", Distributed="distributed")
    def __init__(
        self,
        dim: int,
        heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int | None] | None,
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
        distributed: Any = False,
        *,
        qk_norm: bool = False,
        kv_heads: int | None = None,
        bias: bool = True,
        sub_norm: str | None = None,
        head_offsets: HeadOffsets = "interleaved",
        head_numbers: Sequence[int] | None = None,
        xpos_scale_base: float | None = None,
        rel_pos_buckets: int = 32,
        rel_pos_max_distance: int = 128,
        backend: str = "auto",
        window: int | None = None,
        dilated_queries: bool = True,
        dilation_block: int = 1,
        segment_offset: int = 0,
        shift_keys: bool = False,
        check_coverage: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_ints(1, dim=dim, heads=heads, kv_heads=kv_heads)
        check_flags(causal=causal, use_xpos=use_xpos, use_rel_pos_bias=use_rel_pos_bias, qk_norm=qk_norm, bias=bias)
        check_flags(shift_keys=shift_keys, check_coverage=check_coverage)
        check_sizes(dim, heads, kv_heads, dropout)
        check_sub_norm(sub_norm, causal, distributed)
        if distributed is not False:
            peers_of(group_of(distributed))
        beyond: dict[str, Any] = {
            "window": window,
            "dilated_queries": dilated_queries,
            "dilation_block": dilation_block,
        }
        numbered: dict[str, Any] = {"head_offsets": head_offsets, "head_numbers": head_numbers, "total_heads": heads}
        self.pattern = parse_pattern(segment_size, dilation_rate, **beyond, **numbered).grouped(heads, kv_heads)
        self.segment_offset, self.shift_keys = checked_offset(segment_offset), shift_keys
        self.dim, self.head_dim = dim, dim // heads
        if (numbers := self.pattern.head_numbers) is not None:
            heads, kv_heads = len(numbers.numbers), numbers.kv_heads(kv_heads)
        if check_coverage:
            warn_uncovered(self.pattern, heads)
        self.heads, self.kv_heads = heads, kv_heads
        self.causal, self.distributed, self.backend = causal, distributed, backend
        inner, kv_dim = heads * self.head_dim, kv_heads * self.head_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, inner, bias=bias, **made)
        self.k_proj = nn.Linear(dim, kv_dim, bias=bias, **made)
        self.v_proj = nn.Linear(dim, kv_dim, bias=bias, **made)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **made)
        self.q_norm = make_norm("rms", self.head_dim, **made) if qk_norm else None
        self.k_norm = make_norm("rms", self.head_dim, **made) if qk_norm else None
        self.xpos = XPos(self.head_dim, self.pattern, causal, xpos_scale_base) if use_xpos else None
        buckets: dict[str, Any] = {"num_buckets": rel_pos_buckets, "max_distance": rel_pos_max_distance}
        self.rel_pos_bias = RelativeBias(heads, is_causal=causal, **buckets, **made) if use_rel_pos_bias else None
        self.sub_norm = make_sub_norm(sub_norm, inner, dim, **made)
        # What pruned heads' channels, which a layer norm moves away from zero, come to after ``out_proj``.
        absent = sub_norm == "layer" and inner < dim
        self.absent = nn.Parameter(torch.zeros(2, dim, **made)) if absent else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections, zero biases; pruned heads add nothing."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.absent is not None:
            nn.init.zeros_(self.absent)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        cache: DilatedCache | None = None,
        segment_offset: int | Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, dim), the parameters' dtype (or any floating dtype under autocast).
            key_padding_mask: (B, N) bool, True where a token is to be ignored as a key. Padding counts as positions: on the left
                of a row it moves the row's segments. A warning says so, for every mask on the CPU, elsewhere for the module's
                first one and for those given with a cache.
            cu_seqlens: the documents packed into one row, see :func:`longnet.dilated_attention`; positions restart with each.
            cache: what came before: x are the next N >= 1 tokens, and the result is what one call over everything read so
                far would give for them. Causal only, without gradients, and without a relative bias.
            segment_offset: in place of the module's: an int, or int64 (B,), as in :func:`longnet.dilated_attention`.

        Returns:
            (B, N, dim). Positions that no head covers carry only ``out_proj``'s bias (and the sub-norm's).

        Raises:
            ValueError: x of another rank or width, or a mask of another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, N, dim) with dim={self.dim}")
        return self._attend_projected(
            [projection(x) for projection in self._projections], key_padding_mask,
            cu_seqlens=cu_seqlens, cache=cache, segment_offset=segment_offset,
        )  # fmt: skip

    @property
    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Of queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj

    def _attend_projected(
        self,
        projected: Sequence[Tensor],
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        cache: DilatedCache | None = None,
        segment_offset: int | Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` of what queries, keys and values are projected to: (B, N, heads * D), twice (B, N, kv_heads * D)."""
        x = projected[0]
        # (B, N, heads * D) -> (B, heads, N, D), a view: kernels read any strides.
        q, k, v = (one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        _check_cache(self, cache, cu_seqlens)
        bounds = None if cu_seqlens is None else boundaries(cu_seqlens, x.shape[1])
        group = group_of(self.distributed)
        offset: int | Tensor = self.segment_offset
        if segment_offset is not None:
            if cache is not None:
                raise ValueError(
                    "segment_offset given with a cache: expected cache.set_segment_offset before the first token"
                )
            rows, axis = (x.shape[0], "B") if bounds is None else (len(bounds) - 1, "documents")
            check_segment_offset(segment_offset, rows, x.device, f"x's device {x.device}", axis)
            offset = segment_offset
        at = _positions(self, x, bounds, cache, group, offset)
        half = None
        if self.shift_keys:
            half = _half_of_tokens(k, key_padding_mask)
            before = None if cache is None else cache.last_key
            if group is not None:
                before = row_before(half, group)
            k = shift_keys(k, before=before, padding=key_padding_mask, in_document=at.in_document)
        if self.xpos is not None:
            q, k = self.xpos(q, k, at)
        if cache is not None:
            with cache.reading():
                out = stream_attention_warned(q, k, v, cache, key_padding_mask=key_padding_mask)
                if cache.last_key is not None and half is not None:
                    cache.last_key.copy_(half[:, :, -1:])
            return self._finish(out, key_padding_mask)
        if segment_offset is None:
            _warn_left_padding(self, key_padding_mask, bounds)
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(torch.sym_max(1, torch.sym_min(at.whole, self.pattern.farthest)))
        out = self.attend(
            q, k, v, key_padding_mask=key_padding_mask, cu_seqlens=bounds, distance_bias=bias, group=group,
            segment_offset=offset,
        )  # fmt: skip
        return self._finish(out, key_padding_mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """What the module's definition and pattern compute, (B, H, N, D); ``options`` as of ``pattern_attention``."""
        settings: dict[str, Any] = {"is_causal": self.causal, "backend": self.backend, "definition": self.definition}
        out = pattern_attention(query, key, value, self.pattern, **settings, **options)
        assert isinstance(out, Tensor)
        return out

    def _finish(self, out: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(B, heads, N, D) to the module's (B, N, dim)."""
        out = out.transpose(1, 2).flatten(-2)
        absent = None
        if isinstance(self.sub_norm, PartialNorm):
            out, absent = self.sub_norm(out)
        elif self.sub_norm is not None:
            if is_as_its_class(self.dropout, nn.Dropout) and (self.dropout.p == 0.0 or not self.dropout.training):
                return project_normed(self.sub_norm, [self.out_proj], out, key_padding_mask)[0]
            out = self.sub_norm(out, key_padding_mask)
        out = self.out_proj(self.dropout(out))
        if absent is None or self.absent is None:
            return out
        # Rounded as the projection's result is.
        return out + (absent * self.absent[0] + self.absent[1]).to(out.dtype)

    def extra_repr(self) -> str:
        pattern = self.pattern
        said: dict[str, Any] = {
            "dim": self.dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "segment_lengths": pattern.given_lengths,
            "dilation_rates": pattern.dilation_rates,
            "head_offsets": pattern.head_offsets,
            "causal": self.causal,
            "xpos": self.xpos is not None,
        }
        optional: dict[str, Any] = {
            "head_numbers": None if pattern.head_numbers is None else pattern.head_numbers.numbers,
            "window": pattern.window,
            "dilated_queries": None if pattern.dilated_queries else False,
            "dilation_block": None if pattern.block == 1 else pattern.block,
            "segment_offset": self.segment_offset or None,
            "shift_keys": self.shift_keys or None,
        }
        said |= {name: value for name, value in optional.items() if value is not None}
        return ", ".join(f"{name}={value!r}" for name, value in said.items())


def attend_residual(
    attention: Any, norm: nn.Module, x: Tensor, key_padding_mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(x, ``attention(norm(x), **options)``), where x is read again, as in a residual sum."""
    if not is_as_its_class(attention, DilatedAttention):
        masks = () if key_padding_mask is None else (key_padding_mask,)
        return x, attention(norm(x, *masks), *masks, **options)
    x, projected = project_residual(norm, attention._projections, x, key_padding_mask)
    return x, attention._attend_projected(projected, key_padding_mask, **options)


def _check_cache(module: DilatedAttention, cache: DilatedCache | None, cu_seqlens: Any) -> None:
    """Raises ValueError for what a call cannot combine."""
    if cache is None:
        if cu_seqlens is not None and module.distributed is not False:
            raise ValueError(
                f"cu_seqlens given with distributed={module.distributed!r}: ranks share one sequence, expected whole documents "
                "on each rank of a module that is not distributed"
            )
        return
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens given with a cache: a cache reads one stream, expected one of the two")
    if not module.definition.takes_all_options:
        raise ValueError("cache given with torchscale_compat=True: a cache computes the exact definition alone")
    if not module.causal:
        raise ValueError("cache given with causal=False: a cache holds what came before, expected a causal module")
    if module.rel_pos_bias is not None:
        raise ValueError("cache given with use_rel_pos_bias=True: cached attention takes no relative bias yet")
    if cache.pattern.head_numbers != module.pattern.head_numbers:
        raise ValueError(
            f"cache is of head_numbers={cache.pattern.head_numbers}: expected the module's {module.pattern.head_numbers}"
        )
    for name in ("dilated_queries", "block", "head_offsets"):
        of_cache, own = getattr(cache.pattern, name), getattr(module.pattern, name)
        if of_cache != own:
            raise ValueError(f"cache has {name}={of_cache!r}: expected the module's {own!r}")
    if (cache.pattern.window is None) != (module.pattern.window is None):
        raise ValueError(f"cache has window={cache.pattern.window}: expected the module's {module.pattern.window}")
    if (cache.last_key is not None) != module.shift_keys:
        raise ValueError(
            f"cache has shift_keys={cache.last_key is not None}: expected the module's, {module.shift_keys}"
        )
    # Who moved the grid of each row knows why.
    if not cache._by_row and (of_cache := cache._row_offsets[0]) != module.segment_offset:
        raise ValueError(f"cache has segment_offset={of_cache}: expected the module's {module.segment_offset}")


def _half_of_tokens(key: Tensor, padding: Tensor | None) -> Tensor:
    """What the keys after these take from them: of padding zeros."""
    half = second_half(key)
    return half if padding is None else half.masked_fill(padding[:, None, :, None], 0.0)


def _positions(
    module: DilatedAttention,
    x: Tensor,
    bounds: tuple[int, ...] | None,
    cache: DilatedCache | None,
    group: Any,
    segment_offset: int | Tensor,
) -> Positions:
    """Where the tokens of a call stand: in a stream, in documents, in a shard, or in one sequence."""
    length = x.shape[1]
    if cache is not None:
        grid = 0 if cache.offsets is None else cache.offsets.unsqueeze(-1)
        return Positions(cache.position, length, streaming=True, counter=cache.position_tensor, segment_offset=grid)
    if bounds is not None and (module.xpos is not None or module.shift_keys):
        longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
        if isinstance(segment_offset, Tensor):
            segment_offset = by_token(segment_offset, bounds)
        return Positions(
            0, length, in_document=positions(bounds, x.device), longest=longest, segment_offset=segment_offset
        )
    if isinstance(segment_offset, Tensor):
        segment_offset = segment_offset.unsqueeze(-1)
    if group is None or (module.xpos is None and module.rel_pos_bias is None):
        return Positions(0, length, segment_offset=segment_offset)
    return Positions(*shard_place(group, length), segment_offset=segment_offset)


def _warn_left_padding(module: DilatedAttention, mask: Tensor | None, bounds: tuple[int, ...] | None) -> None:
    # A rank has a part of each row.
    if mask is None or module.distributed is not False or not module.definition.takes_all_options:
        return
    if not torch.compiler.is_compiling():
        grid = module.segment_offset
        warn_left_padding(mask, module.pattern, bounds, segment_offset=grid, first=not module._mask_seen)
        module._mask_seen = True
