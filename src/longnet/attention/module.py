"""The module: projections, positions and dropout around ``dilated_attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.functional import pattern_attention, warn_uncovered
from longnet.attention.packed import boundaries, positions
from longnet.attention.padding import warn_left_padding, warn_moved_rows
from longnet.attention.sharding import lengths_of, peers_of
from longnet.attention.streaming import DilatedCache, most_padding, stream_attention
from longnet.checks import check_flags, check_ints, check_number
from longnet.geometry import HeadOffsets, Pattern
from longnet.nn.norm import PartialNorm, make_norm
from longnet.nn.position import RelativeBias, XPos, rotate
from longnet.runtime.tracing import untraced


class DilatedAttention(nn.Module):
    """Multi-head dilated self-attention, (B, N, dim) to (B, N, dim).

    Source: LongNet, arXiv 2307.02486, section 2. Splits the sequence into segments, keeps every r-th row of each (another
    offset for each head), attends within them, scatters back, and mixes the branches by their softmax denominators.

    Args:
        dim: channels, divisible by ``heads``.
        heads: H query heads.
        dilation_rate: r, an int or one per branch.
        segment_size: w in tokens, an int or one per branch (a mixture).
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
        head_offsets: ``"interleaved"`` (the paper) or ``"blocked"`` (torchscale's checkpoints).
        head_numbers: which of the ``heads`` there are, None for all: others were pruned (see ``longnet.compress``), with whole
            key/value heads. These keep their offsets, D stays ``dim / heads``, and a ``sub_norm`` ("layer" or "rms") takes its
            statistics as if the others gave zeros. The attributes ``heads`` and ``kv_heads`` count those that are left.
        xpos_scale_base: tokens, see :class:`longnet.nn.position.XPos`.
        rel_pos_buckets, rel_pos_max_distance: see :class:`longnet.nn.position.RelativeBias`.
        backend: as in :func:`longnet.dilated_attention`.
        device, dtype: of the parameters.

    Raises:
        TypeError: a number or flag of the wrong type. ValueError: any other bad value; both name the argument.
    """

    _mask_seen = False

    def __init__(
        self,
        dim: int,
        heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int],
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
        distributed: Any = False,
        *,
        casual: bool | None = None,
        Distributed: Any = None,  # noqa: N803
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_ints(1, dim=dim, heads=heads, kv_heads=kv_heads)
        if dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}")
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}")
        causal = _one_spelling("causal", causal, "casual", casual)
        if isinstance(distributed, bool) and (Distributed is None or isinstance(Distributed, bool)):
            distributed = _one_spelling("distributed", distributed, "Distributed", Distributed)
        elif Distributed is not None:
            if distributed is not False:
                raise ValueError(
                    f"distributed={distributed} and Distributed={Distributed} both given: give one of them"
                )
            distributed = Distributed
        check_flags(causal=causal, use_xpos=use_xpos, use_rel_pos_bias=use_rel_pos_bias, qk_norm=qk_norm, bias=bias)
        check_number("dropout", dropout)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout={dropout}: expected a probability in [0, 1]")
        if sub_norm == "batch" and causal:
            raise ValueError(
                "sub_norm='batch' with causal=True: batch statistics run over the whole sequence, so every token would "
                "see later ones; expected 'layer' or 'rms'"
            )
        if distributed is not False:
            peers_of(_group(distributed))
            if sub_norm == "batch":
                raise ValueError(
                    "sub_norm='batch' with distributed: batch statistics run over the whole sequence, of which every rank has "
                    "a shard; expected 'layer' or 'rms'"
                )
        self.pattern = _parse_pattern(segment_size, dilation_rate, head_offsets, head_numbers, heads)
        self.dim, self.head_dim = dim, dim // heads
        if (numbers := self.pattern.head_numbers) is not None:
            heads, kv_heads = len(numbers.numbers), numbers.kv_heads(kv_heads)
        warn_uncovered(self.pattern, heads)

        self.heads, self.kv_heads = heads, kv_heads
        self.causal, self.distributed, self.backend = causal, distributed, backend
        # What computes attention; longnet.compat puts another definition in its place.
        self.function: Callable[..., Tensor | tuple[Tensor, Tensor]] = pattern_attention
        inner, kv_dim = heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner, dim, bias=bias, device=device, dtype=dtype)
        self.q_norm = make_norm("rms", self.head_dim, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = make_norm("rms", self.head_dim, device=device, dtype=dtype) if qk_norm else None
        self.xpos = XPos(self.head_dim, self.pattern, causal, xpos_scale_base) if use_xpos else None
        self.rel_pos_bias = (
            RelativeBias(
                heads,
                is_causal=causal,
                num_buckets=rel_pos_buckets,
                max_distance=rel_pos_max_distance,
                device=device,
                dtype=dtype,
            )
            if use_rel_pos_bias
            else None
        )
        self.sub_norm: nn.Module | None = None
        if sub_norm is not None and inner < dim:
            self.sub_norm = PartialNorm(sub_norm, inner, dim, device=device, dtype=dtype)
        elif sub_norm is not None:
            self.sub_norm = make_norm(sub_norm, dim, device=device, dtype=dtype)
        # A layer norm moves zeros: all pruned heads' channels to one number a token, less what its bias adds. Through
        # ``out_proj`` they came to this vector times that number (0), and to this vector (1).
        self.absent: nn.Parameter | None = None
        if sub_norm == "layer" and inner < dim:
            self.absent = nn.Parameter(torch.zeros(2, dim, device=device, dtype=dtype))
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

        Returns:
            (B, N, dim). Positions that no head covers carry only ``out_proj``'s bias (and the sub-norm's).

        Raises:
            ValueError: x of another rank or width, or a mask of another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, N, dim) with dim={self.dim}")
        # (B, N, heads * D) -> (B, heads, N, D), a view: kernels read any strides.
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        bounds = None if cu_seqlens is None else self._documents(cu_seqlens, x, cache)
        if cache is not None:
            return self._finish(self._stream(q, k, v, key_padding_mask, cache), key_padding_mask)
        if key_padding_mask is not None and not torch.compiler.is_compiling():
            self._warn_left_padding(key_padding_mask, bounds)
        group = _group(self.distributed)
        start, whole = 0, x.shape[1]
        if group is not None and (self.xpos is not None or self.rel_pos_bias is not None):
            start, whole = _place(group, x.shape[1])
        if self.xpos is not None:
            if bounds is None:
                tables = self.xpos.tables(x.shape[1], q.dtype, x.device, start, whole=whole)
            else:
                place = positions(bounds, x.device)
                longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
                once = self.xpos.tables(longest, q.dtype, x.device)
                tables = once[0][place], once[1][place], once[2][place], once[3][place]
            q, k = rotate(q, *tables[:2]), rotate(k, *tables[2:])
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(torch.sym_max(1, torch.sym_min(whole, max(self.pattern.segment_lengths))))
        out = self.function(
            q,
            k,
            v,
            self.pattern,
            is_causal=self.causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=bounds,
            distance_bias=bias,
            backend=self.backend,
            group=group,
        )
        assert isinstance(out, Tensor)
        return self._finish(out, key_padding_mask)

    def _warn_left_padding(self, key_padding_mask: Tensor, bounds: tuple[int, ...] | None) -> None:
        # torchscale leaves padding out before it counts, and a rank has a part of each row.
        if self.function is pattern_attention and self.distributed is False:
            warn_left_padding(key_padding_mask, self.pattern, bounds, first=not self._mask_seen)
            self._mask_seen = True

    def _documents(self, cu_seqlens: Tensor | Sequence[int], x: Tensor, cache: DilatedCache | None) -> tuple[int, ...]:
        if cache is not None:
            raise ValueError("cu_seqlens given with a cache: a cache reads one stream, expected one of the two")
        if self.distributed is not False:
            raise ValueError(
                f"cu_seqlens given with distributed={self.distributed!r}: ranks share one sequence, expected whole documents "
                "on each rank of a module that is not distributed"
            )
        return boundaries(cu_seqlens, x.shape[1])

    def _stream(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, cache: DilatedCache) -> Tensor:
        if self.function is not pattern_attention:
            raise ValueError("cache given with torchscale_compat=True: a cache computes the exact definition alone")
        if not self.causal:
            raise ValueError("cache given with causal=False: a cache holds what came before, expected a causal module")
        if self.rel_pos_bias is not None:
            raise ValueError("cache given with use_rel_pos_bias=True: cached attention takes no relative bias yet")
        if cache.pattern.head_numbers != self.pattern.head_numbers:
            raise ValueError(
                f"cache is of head_numbers={cache.pattern.head_numbers}: expected the module's {self.pattern.head_numbers}"
            )
        if self.xpos is not None:
            if not self.xpos.endless and q.is_cuda and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"segment_lengths={self.pattern.segment_lengths} have no near common boundary, so xPos must stop this stream "
                    "before its scales overflow, which a captured step cannot: expected lengths that divide each other"
                )
            tables = self.xpos.tables(
                q.shape[2], q.dtype, q.device, cache.position, streaming=True, counter=cache.position_tensor
            )
            q, k = rotate(q, *tables[:2]), rotate(k, *tables[2:])
        padding = most_padding(cache)
        out = stream_attention(q, k, v, cache, key_padding_mask=key_padding_mask)
        if most_padding(cache) > padding:
            warn_moved_rows(((count, None) for count in cache.padding.tolist()), self.pattern)
        return out

    def _finish(self, out: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(B, heads, N, D) to the module's (B, N, dim)."""
        out = out.transpose(1, 2).flatten(-2)
        if isinstance(self.sub_norm, PartialNorm):
            out, zero = self.sub_norm(out)
            out = self.out_proj(self.dropout(out))
            # Rounded as the projection's result is.
            return out if self.absent is None else out + (zero * self.absent[0] + self.absent[1]).to(out.dtype)
        if self.sub_norm is not None:
            out = self.sub_norm(out, key_padding_mask)
        return self.out_proj(self.dropout(out))

    def extra_repr(self) -> str:
        pattern = self.pattern
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, segment_lengths={pattern.segment_lengths}, "
            f"dilation_rates={pattern.dilation_rates}, head_offsets={pattern.head_offsets!r}, causal={self.causal}, "
            f"xpos={self.xpos is not None}"
            + ("" if pattern.head_numbers is None else f", head_numbers={pattern.head_numbers.numbers}")
        )


def _one_spelling(name: str, value: bool, other_name: str, other: bool | None) -> bool:
    """An option that has two accepted spellings, of which a caller uses one."""
    if other is None:
        return value
    check_flags(**{name: value, other_name: other})
    if value and not other:
        raise ValueError(f"{name}={value} and {other_name}={other} contradict each other: give one of them")
    return other


def _parse_pattern(segment_size: int | Sequence[int], dilation_rate: int | Sequence[int], *heads: Any) -> Pattern:
    try:
        return Pattern.parse(segment_size, dilation_rate, *heads)
    except (TypeError, ValueError) as error:
        # Name the arguments as this constructor calls them.
        said = str(error).replace("segment_lengths", "segment_size").replace("dilation_rates", "dilation_rate")
        raise type(error)(said) from None


def _group(distributed: Any) -> Any:
    """The group that an option ``distributed`` stands for, None for none.

    Raises:
        ValueError: True, and no default process group.
    """
    if distributed is False:
        return None
    if distributed is not True:
        return distributed
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "distributed=True needs a process group and none is initialised: call "
            "torch.distributed.init_process_group first, or start with torchrun"
        )
    return torch.distributed.group.WORLD


# Ranks talk here: nothing that a graph could hold.
@untraced
def _place(group: Any, length: int) -> tuple[int, int]:
    """(where this rank's shard begins, the length of the whole sequence)."""
    peers = peers_of(group)
    if peers.size == 1:
        return 0, length
    shards = lengths_of(peers, length)
    return shards.start(peers.rank), shards.total
