"""``DilatedCache``: what a causal stream still needs of everything it has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longnet.attention.backends import NAMES
from longnet.attention.definition import warn_uncovered
from longnet.attention.streaming.state import SavedRows
from longnet.checks import check_flags, check_int, check_ints
from longnet.geometry import HeadOffsets, Pattern
from longnet.geometry.pattern import HeadNumbers

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rows are moved between batch rows this many elements at a time.
_SLAB = 1 << 24


class DilatedCache(SavedRows):
    """The keys and values that later tokens can reach, for :func:`longnet.stream_attention`.

    A branch with segment w and rate r reaches at most ``ceil((w - s) / r)`` keys of a head with the offset s, whatever came
    before (LongNet, arXiv 2307.02486, section 2.2). Exactly these are kept, for every branch and head. Query heads that read
    the same key/value head (grouped-query attention) share their rows in the branches in which they have the same
    offset, in a branch of rate 1 always; heads of different offsets select different positions and cannot. A window keeps
    its tokens of each key/value head. The size never changes, unless a segment has no end: then N / r rows are kept.

    Args:
        segment_lengths: w in tokens, an int or one per branch; None has no end. With a ``window`` there may be none: ``()``.
        dilation_rates: r, an int or one per branch, ``1 <= r <= w``.
        batch_size: B, sequences that are read side by side and stand at the same position.
        heads: H query heads.
        head_dim: D, channels of a head.
        kv_heads: Hk key/value heads, divides ``heads``. Default ``heads``.
        head_offsets: ``"interleaved"`` (``j mod r``, the paper), ``"blocked"`` (``j // ceil(H / r)``, torchscale) or
            ``"grouped"`` (``j // (H / Hk) mod r``).
        head_numbers: which of the ``heads`` there are, None for all: others were pruned, with whole key/value heads. The
            attributes ``heads`` and ``kv_heads`` count those that are left.
        window, dilated_queries, dilation_block, segment_offset: as of :func:`longnet.dilated_attention`; the offset may be
            int64 (B,), and :meth:`set_segment_offset` can change it until a row's first real token.
        capacity: tokens that are read at most, more raise an error. Segments without end then have room for exactly these;
            without it their room doubles when it is full, which a captured step of a CUDA graph cannot do.
        shift_keys: also keep ``last_key``, for a module whose keys depend on the token before.
        check_coverage: warn of positions that no head covers.
        backend: of the calls that read with it, as in :func:`longnet.dilated_attention`.
        dtype: of keys and values, torch's default dtype if None.
        device: where they are.

    Attributes:
        keys, values: (B, rows, D), the storage; ``layout`` says which rows are whose. Rows not yet read hold anything.
        padding: (B,) int64, how many tokens each row's left padding has; the first real token stands there.
        position_tensor: () int64, ``position`` on the device, for steps captured in a CUDA graph.
        offsets: (B,) int64, the grid's offset in each row, or None where all are 0.
        last_key: (B, Hk, 1, D // 2) zeros with ``shift_keys``, else None. Its user reads it and writes it in place, in one
            :meth:`reading` with the call that reads the tokens.

    An exception while rows are written or moved (an interrupt, no memory left) leaves a cache that refuses to go on and to be
    saved, until it is reset or loads a state.

    Raises:
        TypeError: an argument of the wrong type. ValueError: any other bad value; both name the argument.
    """

    def __init__(
        self,
        segment_lengths: int | Sequence[int | None] | None,
        dilation_rates: int | Sequence[int],
        *,
        batch_size: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        head_numbers: Sequence[int] | None = None,
        window: int | None = None,
        dilated_queries: bool = True,
        dilation_block: int = 1,
        segment_offset: int | Tensor = 0,
        capacity: int | None = None,
        shift_keys: bool = False,
        check_coverage: bool = True,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        check_ints(1, batch_size=batch_size, heads=heads, head_dim=head_dim, kv_heads=kv_heads)
        if capacity is not None:
            check_int("capacity", capacity, 1)
        check_flags(shift_keys=shift_keys, check_coverage=check_coverage)
        if backend not in NAMES:
            raise ValueError(f"backend={backend!r} is unknown: expected one of {NAMES}")
        self.backend = backend
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}")
        pattern = Pattern.compose(
            segment_lengths,
            dilation_rates,
            window=window,
            dilated_queries=dilated_queries,
            dilation_block=dilation_block,
            head_offsets=head_offsets,
        ).grouped(heads, kv_heads)
        if head_numbers is not None:
            numbers = HeadNumbers.parse(head_numbers, heads)
            pattern = replace(pattern, head_numbers=numbers)
            kv_heads, heads = numbers.kv_heads(kv_heads), len(numbers.numbers)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype={dtype!r} has type {type(dtype).__name__}: expected a torch.dtype")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, _DTYPES))}")
        if check_coverage:
            warn_uncovered(pattern, heads)
        super().__init__(
            pattern,
            batch_size=batch_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            capacity=capacity,
            segment_offset=segment_offset,
            shift_keys=shift_keys,
            dtype=dtype,
            device=device,
        )

    def reset(self) -> None:
        """Forget everything: the next token is the first, on the grid that the cache was made with."""
        as_made = not self._torn and self._row_offsets == self._offsets_of(self._first_offset)
        self._torn = True
        self._position = self._furthest = self._most_padding = 0
        self.position_tensor.zero_()
        self.padding.zero_()
        if self.last_key is not None:
            self.last_key.zero_()
        if not as_made:
            self._place_grid(self._first_offset)
        self._torn = False

    def clone(self) -> DilatedCache:
        """A copy that goes its own way: read a long prefix once, continue it many ways."""
        copy = DilatedCache.__new__(DilatedCache)
        # The tables are constants; everything else that is written to gets storage of its own.
        copy.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            for name in ("keys", "values", "padding", "position_tensor", "offsets", "last_key"):
                if (own := getattr(self, name)) is not None:
                    setattr(copy, name, own.clone())
        copy._captured = False
        return copy

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row ``index[b]`` has read: for beams. In place; ``index`` is (B,) int64 or int32.

        Raises:
            TypeError: an index that is no tensor of integers. ValueError: one of another shape or out of range.
        """
        self._check_order(index)
        index = index.to(self.device)
        step = max(1, _SLAB // (self.batch_size * self.head_dim))
        with self._writing():
            for x in (self.keys, self.values):
                for slab in x.split(step, dim=1):
                    slab.copy_(slab.index_select(0, index))
            for own in (self.offsets, self.last_key):
                if own is not None:
                    own.copy_(own.index_select(0, index))
            self._row_offsets = tuple(self._row_offsets[row] for row in index.tolist())
            self._set_padding(self.padding.index_select(0, index), self._most_padding)

    def _check_order(self, index: Tensor) -> None:
        if not isinstance(index, Tensor):
            raise TypeError(f"index has type {type(index).__name__}: expected a torch.Tensor")
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index has dtype {index.dtype}: expected torch.int64")
        if index.shape != (self.batch_size,):
            raise ValueError(f"index has shape {tuple(index.shape)}: expected (B,) = ({self.batch_size},)")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= self.batch_size:
            raise ValueError(f"index holds {low if low < 0 else high}: expected batch rows 0 to {self.batch_size - 1}")
