"""A stream's rows as tensors of a file, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longnet.attention.streaming.storage import RowStorage
from longnet.geometry import HEAD_OFFSETS
from longnet.geometry.layout import Block

# Of files with windows, strides, blocks, other grids or a last key; files of the paper's patterns name none.
_FORMAT = 2


class SavedRows(RowStorage):
    """A :class:`RowStorage` that can be saved."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, copies that later tokens leave alone; ``safetensors.torch.save_file`` takes it as it is.

        ``keys`` and ``values`` (B, rows, D); ``position`` (), ``padding`` (B,), ``segment_lengths`` and ``dilation_rates``
        (branches,), ``heads`` (2,) with H and Hk, ``head_offsets`` () as a number of ``longnet.geometry.HEAD_OFFSETS``,
        all int64 on the CPU; with ``head_numbers`` these and, last, their total too.

        Where anything is beyond LongNet's paper there is also a ``format`` () of 2: each block has only its rows in reach,
        0 stands for None in ``segment_lengths`` and ``window`` (), and ``dilated_queries`` (), ``dilation_block`` (),
        ``segment_offset`` () or (B,) as the cache was made with, ``offsets`` (B,) as they are now and ``furthest`` (), the
        largest position so far, are int64 on the CPU; with ``shift_keys`` also ``last_key``.
        A cache of the paper's patterns has all rows and no ``format``.

        Raises:
            ValueError: an exception left the cache half-written.
        """
        self._check_whole()
        state = {"padding": self.padding.to("cpu", copy=True), "position": torch.tensor(self._position, device="cpu")}
        if self._as_published and self.offsets is None:
            return {"keys": self.keys.clone(), "values": self.values.clone(), **state, **self._description(None)}
        blocks = self._saved_blocks(self._position, self._row_offsets)
        for i, name in enumerate(("keys", "values")):
            state[name] = torch.cat([self._rows_of(*block)[i].flatten(1, 2) for block in blocks], 1)
        if self.last_key is not None:
            state["last_key"] = self.last_key.clone()
        own = {"offsets": _ints(self._row_offsets), "furthest": _ints(self._furthest)}
        return state | own | self._description(_FORMAT)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of :meth:`state_dict`, on any device and of any capacity. On any error the cache is as it was.

        Raises:
            TypeError: an entry that is no tensor. ValueError: entries that are missing, unknown or impossible, more tokens
                than ``capacity``, or a state of another pattern, grid, batch size, heads, head dimension or dtype.
        """
        self._check_entries(state)
        if "format" not in state:
            self._check_rows(state, self.layout.rows)
        position, padding = self._checked_position(state)
        offsets = tuple(state["offsets"].tolist()) if "offsets" in state else (0,) * self.batch_size
        if "format" in state:
            saved = self._saved_blocks(position, offsets)
            self._check_rows(state, sum(block.kv_count * (high - low) for block, low, high in saved))
        if self.capacity is not None and position > self.capacity:
            raise ValueError(f"state['position'] is {position}: expected at most this cache's capacity={self.capacity}")
        self._make_room(position - self._position)
        another_grid, self._torn = self._torn or offsets != self._row_offsets, True
        if another_grid:
            as_made = offsets == self._offsets_of(self._first_offset)
            self._place_grid(self._first_offset if as_made else _ints(offsets))
        first = 0
        for block, low, high in self._saved_blocks(position, offsets) if "format" in state else self._all_blocks():
            last = first + block.kv_count * (high - low)
            for name, target in zip(("keys", "values"), self._rows_of(block, low, high), strict=True):
                target.copy_(state[name][:, first:last].unflatten(1, (block.kv_count, high - low)))
            first = last
        if self.last_key is not None:
            self.last_key.copy_(state["last_key"])
        self._position, self._furthest = position, int(state.get("furthest", position))
        self.position_tensor.fill_(position)
        self._set_padding(padding, int(padding.max()))
        self._torn = False

    @property
    def _as_published(self) -> bool:
        """Whether it was made with nothing that files without a ``format`` do not have."""
        on_grid = isinstance(self._first_offset, int) and self._first_offset == 0
        return on_grid and self.last_key is None and self.pattern.beyond_paper is None

    def _all_blocks(self) -> list[tuple[Block, int, int]]:
        return [(block, 0, block.rows) for block in self.layout.blocks]

    def _saved_blocks(self, position: int, offsets: tuple[int, ...]) -> list[tuple[Block, int, int]]:
        """(block, first row, row after the last) that a row of the batch has in reach."""
        kept = self._kept_rows(position, offsets)
        return [
            (block, min(low for low, _ in own), max(high for _, high in own))
            for block, own in zip(self.layout.blocks, kept, strict=True)
        ]

    def _description(self, file_format: int | None) -> dict[str, Tensor]:
        """What a state says about its cache, in files of a format."""
        pattern = self.pattern
        described = {
            "segment_lengths": _ints([length or 0 for length in pattern.given_lengths]),
            "dilation_rates": _ints(pattern.dilation_rates),
            "heads": _ints([self.heads, self.kv_heads]),
            "head_offsets": _ints(HEAD_OFFSETS.index(pattern.head_offsets)),
        }
        if (numbers := pattern.head_numbers) is not None:
            described["head_numbers"] = _ints([*numbers.numbers, numbers.total])
        if file_format is None:
            return described
        first = self._first_offset
        return described | {
            "format": _ints(file_format),
            "window": _ints(pattern.window or 0),
            "dilated_queries": _ints(int(pattern.dilated_queries)),
            "dilation_block": _ints(pattern.branches[0].block if pattern.branches else 1),
            "segment_offset": first.to("cpu", copy=True) if isinstance(first, Tensor) else _ints(first),
        }

    def _check_entries(self, state: Mapping[str, Tensor]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state has type {type(state).__name__}: expected a mapping of names to tensors")
        new = "format" in state or not self._as_published
        described = self._description(_FORMAT if new else None)
        names = {"keys", "values", "padding", "position", *described, *(("offsets", "furthest") if new else ())}
        if self.last_key is not None:
            names.add("last_key")
        if set(state) != names:
            raise ValueError(f"state holds {sorted(state)}: expected {sorted(names)}")
        for name, x in state.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"state[{name!r}] has type {type(x).__name__}: expected a torch.Tensor")
        for name, expected in described.items():
            saved = state[name]
            if saved.dtype != torch.int64 or saved.tolist() != expected.tolist():
                raise ValueError(f"state[{name!r}] is {saved.tolist()}: expected this cache's {expected.tolist()}")

    def _checked_position(self, state: Mapping[str, Tensor]) -> tuple[int, Tensor]:
        rows = (self.batch_size,)
        shapes: dict[str, tuple[int, ...]] = {"position": (), "padding": rows, "offsets": rows, "furthest": ()}
        for name, shape in shapes.items():
            if name in state and (state[name].shape != shape or state[name].dtype != torch.int64):
                raise ValueError(
                    f"state[{name!r}] has shape {tuple(state[name].shape)} and dtype {state[name].dtype}: "
                    f"expected {shape} and torch.int64"
                )
        position, padding = int(state["position"]), state["padding"]
        if position < 0:
            raise ValueError(f"state['position'] is {position}: expected a number of tokens")
        if int(padding.min()) < 0 or int(padding.max()) > position:
            raise ValueError(f"state['padding'] is {padding.tolist()}: expected 0 to the position, {position}")
        if "format" in state:
            self._check_offset(state["offsets"].to(self.device))
            if (furthest := int(state["furthest"])) < position:
                raise ValueError(f"state['furthest'] is {furthest}: expected at least the position, {position}")
        return position, padding

    def _check_rows(self, state: Mapping[str, Tensor], rows: int) -> None:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("keys", "values"), (self.batch_size, rows, self.head_dim))
        if self.last_key is not None:
            shapes["last_key"] = tuple(self.last_key.shape)
        for name, shape in shapes.items():
            saved = state[name]
            if saved.shape != shape:
                axes = "(B, Hk, D // 2)" if name == "last_key" else "(B, rows, D)"
                raise ValueError(f"state[{name!r}] has shape {tuple(saved.shape)}: expected {axes} = {shape}")
            if saved.dtype != self.dtype:
                raise ValueError(f"state[{name!r}] has dtype {saved.dtype}: expected this cache's {self.dtype}")


def _ints(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
