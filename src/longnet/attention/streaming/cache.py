"""``DilatedCache``: what a causal stream still needs of everything it has read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from longnet.attention.definition import warn_uncovered
from longnet.attention.streaming.tables import StepTables
from longnet.checks import check_ints
from longnet.geometry import HEAD_OFFSETS, HeadOffsets, Pattern
from longnet.geometry.layout import Block, make_layout

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rows are moved between batch rows this many elements at a time.
_SLAB = 1 << 24


class DilatedCache:
    """The keys and values that later tokens can reach, for :func:`longnet.stream_attention`. Its size never changes.

    A branch with segment w and rate r reaches at most ``ceil((w - s) / r)`` keys of a head with the offset s, whatever came
    before (LongNet, arXiv 2307.02486, section 2.2). Exactly these are kept, for every branch and head. Query heads that read
    the same key/value head (grouped-query attention) share their rows in the branches in which they have the same
    offset, in a branch of rate 1 always; heads of different offsets select different positions and cannot.

    Args:
        segment_lengths: w in tokens, an int or one per branch.
        dilation_rates: r, an int or one per branch, ``1 <= r <= w``.
        batch_size: B, sequences that are read side by side and stand at the same position.
        heads: H query heads.
        head_dim: D, channels of a head.
        kv_heads: Hk key/value heads, divides ``heads``. Default ``heads``.
        head_offsets: ``"interleaved"`` (``j mod r``, the paper) or ``"blocked"`` (``j // ceil(H / r)``, torchscale).
        head_numbers: which of the ``heads`` there are, None for all: others were pruned, with whole key/value heads. The
            attributes ``heads`` and ``kv_heads`` count those that are left.
        dtype: of keys and values, torch's default dtype if None.
        device: where they are.

    Attributes:
        keys, values: (B, rows, D), the storage; ``layout`` says which rows are whose. Rows not yet read hold anything.
        padding: (B,) int64, how many tokens each row's left padding has; the first real token stands there.
        position_tensor: () int64, ``position`` on the device, for steps captured in a CUDA graph.

    An exception while rows are written or moved (an interrupt, no memory left) leaves a cache that refuses to go on and to be
    saved, until it is reset or loads a state.

    Raises:
        TypeError: an argument of the wrong type. ValueError: any other bad value; both name the argument.
    """

    def __init__(
        self,
        segment_lengths: int | Sequence[int],
        dilation_rates: int | Sequence[int],
        *,
        batch_size: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        head_numbers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        check_ints(1, batch_size=batch_size, heads=heads, head_dim=head_dim, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}")
        self.pattern = Pattern.parse(segment_lengths, dilation_rates, head_offsets, head_numbers, heads)
        if self.pattern.head_numbers is not None:
            kv_heads = self.pattern.head_numbers.kv_heads(kv_heads)
            heads = len(self.pattern.head_numbers.numbers)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype={dtype!r} has type {type(dtype).__name__}: expected a torch.dtype")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, _DTYPES))}")
        warn_uncovered(self.pattern, heads)
        self.batch_size, self.heads, self.kv_heads, self.head_dim = batch_size, heads, kv_heads, head_dim
        self.layout = make_layout(self.pattern, heads, kv_heads)
        # Tensors of inference mode could not be written to outside of it; a cache may outlive the mode it was made in.
        with torch.inference_mode(False):
            self.keys = torch.zeros(batch_size, self.layout.rows, head_dim, dtype=dtype, device=device)
            self.values = torch.zeros_like(self.keys)
            self.padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.position_tensor = torch.zeros((), dtype=torch.int64, device=device)
            self.tables = StepTables(self.layout, self.keys.device)
        self._position = 0
        self._most_padding = 0  # the largest of `padding`, known without asking the device
        self._torn = False  # an exception came while the cache was written

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
    def nbytes(self) -> int:
        """Bytes of all tensors: keys and values, and bookkeeping of a few numbers per branch, head and batch row."""
        own = (self.keys, self.values, self.padding, self.position_tensor)
        return sum(x.nbytes for x in own) + self.tables.nbytes

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
        """
        with self._writing():
            self._position += tokens
            if on_device:
                self.position_tensor.fill_(self._position)

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

    def _set_padding(self, padding: Tensor, most: int) -> None:
        """Take over what a key padding mask said: (B,) int64 and its largest value."""
        self.padding.copy_(padding)
        self._most_padding = most

    def reset(self) -> None:
        """Forget everything: the next token is the first."""
        self._torn = True
        self._position = self._most_padding = 0
        self.position_tensor.zero_()
        self.padding.zero_()
        self._torn = False

    def clone(self) -> DilatedCache:
        """A copy that goes its own way: read a long prefix once, continue it many ways."""
        copy = DilatedCache.__new__(DilatedCache)
        # The tables are constants; everything else that is written to gets storage of its own.
        copy.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            for name in ("keys", "values", "padding", "position_tensor"):
                setattr(copy, name, getattr(self, name).clone())
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

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, copies that later tokens leave alone; ``safetensors.torch.save_file`` takes it as it is.

        ``keys`` and ``values`` (B, rows, D); ``position`` (), ``padding`` (B,), ``segment_lengths`` and ``dilation_rates``
        (branches,), ``heads`` (2,) with H and Hk, ``head_offsets`` () as a number of ``longnet.geometry.HEAD_OFFSETS``,
        all int64 on the CPU; with ``head_numbers`` these and, last, their total too.

        Raises:
            ValueError: an exception left the cache half-written.
        """
        self._check_whole()
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "padding": self.padding.to("cpu", copy=True),
            "position": torch.tensor(self._position, device="cpu"),
            **self._description(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of :meth:`state_dict`, on any device. On any error the cache is as it was.

        Raises:
            TypeError: an entry that is no tensor. ValueError: entries that are missing, unknown or impossible, or a state
                of another pattern, batch size, heads, head dimension or dtype.
        """
        self._check_state(state)
        self._torn = True
        self.keys.copy_(state["keys"])
        self.values.copy_(state["values"])
        self._position = int(state["position"])
        self.position_tensor.fill_(self._position)
        self._set_padding(state["padding"], int(state["padding"].max()))
        self._torn = False

    def _description(self) -> dict[str, Tensor]:
        described = {
            "segment_lengths": torch.tensor(self.pattern.segment_lengths),
            "dilation_rates": torch.tensor(self.pattern.dilation_rates),
            "heads": torch.tensor([self.heads, self.kv_heads]),
            "head_offsets": torch.tensor(HEAD_OFFSETS.index(self.pattern.head_offsets)),
        }
        if (numbers := self.pattern.head_numbers) is not None:
            described["head_numbers"] = torch.tensor([*numbers.numbers, numbers.total])
        return described

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        described = self._description()
        names = {"keys", "values", "padding", "position", *described}
        if not isinstance(state, Mapping):
            raise TypeError(f"state has type {type(state).__name__}: expected a mapping of names to tensors")
        if set(state) != names:
            raise ValueError(f"state holds {sorted(state)}: expected {sorted(names)}")
        for name, x in state.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"state[{name!r}] has type {type(x).__name__}: expected a torch.Tensor")
        for name, expected in described.items():
            saved = state[name]
            if saved.dtype != torch.int64 or saved.tolist() != expected.tolist():
                raise ValueError(f"state[{name!r}] is {saved.tolist()}: expected this cache's {expected.tolist()}")
        for name in ("keys", "values"):
            saved, own = state[name], self.keys
            if saved.shape != own.shape:
                raise ValueError(
                    f"state[{name!r}] has shape {tuple(saved.shape)}: expected (B, rows, D) = {tuple(own.shape)}"
                )
            if saved.dtype != own.dtype:
                raise ValueError(f"state[{name!r}] has dtype {saved.dtype}: expected this cache's {own.dtype}")
        for name, shape in (("position", ()), ("padding", (self.batch_size,))):
            if state[name].shape != shape or state[name].dtype != torch.int64:
                raise ValueError(
                    f"state[{name!r}] has shape {tuple(state[name].shape)} and dtype {state[name].dtype}: "
                    f"expected {shape} and torch.int64"
                )
        position, padding = int(state["position"]), state["padding"]
        if position < 0:
            raise ValueError(f"state['position'] is {position}: expected a number of tokens")
        if int(padding.min()) < 0 or int(padding.max()) > position:
            raise ValueError(f"state['padding'] is {padding.tolist()}: expected 0 to the position, {position}")
