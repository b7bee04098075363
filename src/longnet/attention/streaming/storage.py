"""Where a stream's rows lie: their tensors, the grid that they are numbered on, and how they grow where a segment never ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longnet.attention.call import check_segment_offset
from longnet.attention.padding import leading_padding
from longnet.attention.streaming.band_tables import BandTables
from longnet.attention.streaming.tables import StepTables
from longnet.checks import check_int
from longnet.geometry import Pattern
from longnet.geometry.layout import Block, Layout, make_layout
from longnet.geometry.pattern import LONGEST_SEGMENT
from longnet.geometry.rows import UNBOUNDED
from longnet.runtime.cache import tensor_cache

# Tokens that a segment without end has room for at first, where no capacity is given.
_FIRST_ROOM = 1024

# The tables are constants, so caches of one layout share them: those of equal layers, and those of later calls.
_step_tables, _band_tables = tensor_cache(64)(StepTables), tensor_cache(64)(BandTables)


class RowStorage:
    """The tensors of a :class:`longnet.DilatedCache`, and the numbers that say what is where in them."""

    keys: Tensor
    values: Tensor
    layout: Layout
    tables: StepTables | BandTables
    offsets: Tensor | None
    # Each batch row's offset of the grid, and whether they were given one by one: who does so knows what padding does.
    _row_offsets: tuple[int, ...]
    _by_row: bool
    # Whether all is as in LongNet's paper: what the paths that know nothing else can take.
    _is_paper: bool

    def __init__(
        self,
        pattern: Pattern,
        *,
        batch_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        capacity: int | None,
        segment_offset: int | Tensor,
        shift_keys: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.pattern, self.capacity = pattern, capacity
        # Chunks that begin with the first token are computed with this pattern. A model's cache has the model's own pattern here
        # and a pattern of shorter segments above, which give the same rows: its kernels then do not depend on the capacity.
        self._whole_pattern = pattern
        self.batch_size, self.heads, self.kv_heads, self.head_dim = batch_size, heads, kv_heads, head_dim
        # Tensors of inference mode could not be written to outside of it; a cache may outlive the mode it was made in.
        with torch.inference_mode(False):
            self.padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.position_tensor = torch.zeros((), dtype=torch.int64, device=device)
            last = (batch_size, kv_heads, 1, head_dim // 2)
            self.last_key = torch.zeros(last, dtype=dtype, device=device) if shift_keys else None
            self._check_offset(segment_offset)
            # Tokens that a segment without end has room for; 0 where there is none.
            self._room = 0 if self.bounded else _FIRST_ROOM if capacity is None else capacity
            self.layout = make_layout(pattern, heads, kv_heads, self._room)
            self.keys = torch.zeros(batch_size, self.layout.rows, head_dim, dtype=dtype, device=device)
            self.values = torch.zeros_like(self.keys)
            self._first_offset = segment_offset.clone() if isinstance(segment_offset, Tensor) else segment_offset
            self._place_grid(segment_offset)
        self._position = 0
        self._furthest = 0  # the largest position so far: tokens that were taken back have been written over others
        self._most_padding = 0  # the largest of `padding`, known without asking the device
        self._torn = False  # an exception came while the cache was written
        self._captured = False  # a CUDA graph knows where the rows lie

    @property
    def position(self) -> int:
        """Tokens read so far, padding included: the position of the next one."""
        return self._position

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def bounded(self) -> bool:
        """Whether its size never changes: no segment is without end."""
        return UNBOUNDED not in self.pattern.segment_lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: keys and values, and bookkeeping of a few numbers per branch, head and batch row."""
        optional = [x for x in (self.offsets, self.last_key) if x is not None]
        own = (self.keys, self.values, self.padding, self.position_tensor, *optional)
        return sum(x.nbytes for x in own) + self.tables.nbytes

    @property
    def nbytes_used(self) -> int:
        """Of :attr:`nbytes`, without the rows that hold nothing in reach yet."""
        kept = self._kept_rows(self._position, self._row_offsets)
        rows = sum(
            block.kv_count * sum(high - low for low, high in own)
            for block, own in zip(self.layout.blocks, kept, strict=True)
        )
        each = 2 * self.head_dim * self.keys.element_size()
        return self.nbytes - (self.batch_size * self.layout.rows - rows) * each

    def _kept_rows(self, position: int, offsets: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
        """For each block what :meth:`longnet.geometry.layout.Layout.kept_rows` says of each row of the batch."""
        by_offset = {offset: self.layout.kept_rows(position, offset) for offset in set(offsets)}
        return zip(*(by_offset[offset] for offset in offsets), strict=True)

    def _pattern_of_chunk(self) -> Pattern:
        """The pattern that the next tokens attend to one another by."""
        return self.pattern if self._position else self._whole_pattern

    def _rows_of(self, block: Block, first: int, last: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
        """Rows ``[first, last)`` of a block's keys and values, (B, Hk of the block, last - first, D) each, as views.

        Of this many ``blocks`` of one shape, one behind the other, if there are several.
        """
        span, shape = slice(block.first, block.first + blocks * block.size), (blocks * block.kv_count, block.rows)
        keys, values = (x[:, span].unflatten(1, shape)[:, :, first:last] for x in (self.keys, self.values))
        return keys, values

    def moved(self, tokens: int, *, on_device: bool = True) -> None:
        """Count tokens whose rows have been written; not ``on_device`` when a step has counted them there itself.

        Who replays a captured step calls ``moved(1, on_device=False)`` after it: a replay knows nothing of Python's numbers.

        Args:
            tokens: below 0 it takes back what was counted and not written, the token of a capture say. For tokens that were
                read ask :meth:`holds` first: rows may have been written over.

        Raises:
            ValueError: more than were counted are taken back, or they do not fit into the capacity. The cache then refuses to
                go on.
        """
        if self._position + tokens < 0:
            raise ValueError(f"tokens={tokens} at position {self._position}: expected at least {-self._position}")
        with self._writing():
            self._position += tokens
            self._furthest = max(self._furthest, self._position)
            if self._most_padding > self._position:
                # Padding was taken back: what is read next is none unless a mask says so.
                self._set_padding(self.padding.clamp(max=self._position), self._position)
            if on_device:
                self.position_tensor.fill_(self._position)
            room = self.capacity or self._room
            if room and self._position > room:
                raise ValueError(
                    f"cache stands at position {self._position} and has room for {room} tokens: expected a capacity of as many "
                    "tokens as are read, replays of a captured step among them"
                )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which :func:`longnet.stream_attention` and a write to ``last_key`` are one.

        After an exception the cache is as it was, or refuses to go on.

        Raises:
            ValueError: an exception left the cache half-written before.
        """
        self._check_whole()
        position = self._position
        try:
            yield
        except BaseException:
            self._torn = self._torn or self._position != position
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Rows and position belong together: what an exception leaves half-written, nothing reads."""
        before, self._torn = self._torn, True
        yield
        self._torn = before

    def _check_whole(self) -> None:
        """Refuse a cache that an exception left half-written."""
        if self._torn:
            raise ValueError(
                f"cache was being written at position {self._position} when an exception came: expected one after reset() or "
                "load_state_dict(), or a clone made before"
            )

    def _padded(self, tokens: int) -> Tensor | None:
        """Which of the next tokens are padding, (B, tokens) bool; None where none is."""
        if self._most_padding <= self._position:
            return None
        position = torch.arange(self._position, self._position + tokens, device=self.device)
        return position < self.padding[:, None]

    def _set_padding(self, padding: Tensor, most: int) -> None:
        """Take over what a key padding mask said: (B,) int64 and its largest value."""
        self.padding.copy_(padding)
        self._most_padding = most

    def set_segment_offset(self, segment_offset: int | Tensor) -> None:
        """Move the grid of rows without a real token yet: position ``p`` counts as ``p + segment_offset``, until :meth:`reset`.

        For rows that are padded on the left: minus a row's padding makes it what it is alone. A step is captured in a CUDA
        graph after it. A tensor is read once and waited for.

        Args:
            segment_offset: an int, or (B,) int64 on the cache's device, one for each batch row.

        Raises:
            TypeError: neither. ValueError: another shape or device, above 2**40 in magnitude, or another offset than before
                for a row of which more than padding has been read.
        """
        self._check_whole()
        self._check_offset(segment_offset)
        if self._position:
            started = (self.padding < self._position).tolist()
            pairs = zip(self._row_offsets, self._offsets_of(segment_offset), strict=True)
            for row, (old, new) in enumerate(pairs):
                if started[row] and old != new:
                    raise ValueError(
                        f"segment_offset={new} for row {row}, {self._position} tokens of which were read with {old}: expected "
                        "it before the row's first real token, or after reset()"
                    )
        self._place_grid(segment_offset)

    def _leading(self, padded: Tensor) -> Tensor | None:
        """Tokens before each row's first real one, (B,) int64, by a mask (B, T) of the next tokens; None if no row has any."""
        leading = self._position + leading_padding(padded.to(self.device))
        leading = torch.where(self.padding < self._position, self.padding, leading)
        return leading if leading.any() else None

    def _check_offset(self, segment_offset: int | Tensor) -> None:
        device = self.padding.device
        check_segment_offset(segment_offset, self.batch_size, device, f"the cache's device {device}")
        if isinstance(segment_offset, Tensor) and (largest := int(segment_offset.abs().max())) > LONGEST_SEGMENT:
            raise ValueError(f"segment_offset holds {largest} in magnitude: expected at most {LONGEST_SEGMENT}")

    def _place_grid(self, segment_offset: int | Tensor) -> None:
        row_offsets = self._offsets_of(segment_offset)
        is_paper = self.pattern.beyond_paper is None and not any(row_offsets)
        with torch.inference_mode(False):
            offsets = torch.tensor(row_offsets, device=self.padding.device) if any(row_offsets) else None
            tables = self._make_tables(self.layout, is_paper)
        # At once: an interrupt finds all of it or nothing.
        self.__dict__.update(
            _row_offsets=row_offsets,
            _by_row=isinstance(segment_offset, Tensor),
            _is_paper=is_paper,
            offsets=offsets,
            tables=tables,
        )

    def _offsets_of(self, segment_offset: int | Tensor) -> tuple[int, ...]:
        if isinstance(segment_offset, Tensor):
            return tuple(segment_offset.tolist())
        return (segment_offset,) * self.batch_size

    def _make_tables(self, layout: Layout, is_paper: bool) -> StepTables | BandTables:
        if is_paper:
            return _step_tables(layout, self.keys.device)
        return _band_tables(layout, self.batch_size, self.keys.device)

    def _make_room(self, tokens: int) -> None:
        """See to it that the next tokens can be written.

        Raises:
            ValueError: they are more than ``capacity``, or the cache would have to grow where a CUDA graph knows its tensors.
        """
        needed = self._position + tokens
        if self.capacity is not None and needed > self.capacity:
            raise ValueError(
                f"{tokens} tokens at position {self._position} of a cache with capacity={self.capacity}: expected at most "
                f"{self.capacity - self._position} more"
            )
        if not self._room:
            return
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if needed > self._room and (capturing or self._captured):
            raise ValueError(
                f"capacity=None and room for {self._room} tokens, too few for position {needed}: a cache cannot grow after one "
                "of its steps is captured in a CUDA graph; expected a capacity"
            )
        self._captured = self._captured or capturing
        room = self._room
        while room < needed:
            room *= 2
        if room != self._room:
            self._grow(room)

    def _grow(self, room: int) -> None:
        before, layout = self.layout, make_layout(self.pattern, self.heads, self.kv_heads, room)
        with torch.inference_mode(False):
            grown = [x.new_zeros(self.batch_size, layout.rows, self.head_dim) for x in (self.keys, self.values)]
            for old, new in zip(before.blocks, layout.blocks, strict=True):
                for target, source in zip(grown, (self.keys, self.values), strict=True):
                    rows = target[:, new.first : new.first + new.size].unflatten(1, (new.kv_count, new.rows))
                    rows[:, :, : old.rows] = source[:, old.first : old.first + old.size].unflatten(
                        1, (old.kv_count, old.rows)
                    )
            tables = self._make_tables(layout, self._is_paper)
        # At once: an interrupt finds all of it or nothing.
        self.__dict__.update(keys=grown[0], values=grown[1], layout=layout, tables=tables, _room=room)

    def holds(self, position: int) -> bool:
        """Whether all that the token after an earlier ``position`` reads is still there, so that ``moved`` can go back to it.

        Raises:
            TypeError: no int. ValueError: below 0, or later than the cache's own.
        """
        if check_int("position", position, 0) > self._position:
            raise ValueError(f"position={position}: expected at most the cache's own, {self._position}")
        if position == self._position:
            return True
        width = self.pattern.window
        overwritten = width is not None and self._furthest > max(width, position + 1)
        return (
            not overwritten
            and self.last_key is None
            and all(self.pattern.same_segments(position, self._position, offset) for offset in set(self._row_offsets))
        )
