"""``generate``'s cache of a LongNet: bounded, of fixed size, and exact when tokens are taken back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from longnet.models.base import LongNetBase
from longnet.models.cache import LongNetCache as PlainCache
from longnet.models.cache import make_cache
from longnet.models.captured import CapturedStep, can_capture

# Tokens between two states that are kept to go back to: what can be taken back at least.
_STRIDE = 512
# What the models of one cache must agree on, as fields of the plain config.
_SHARED = (
    *("dim", "layers", "heads", "kv_heads", "head_numbers", "segment_lengths", "dilation_rates", "head_offsets"),
    *("use_xpos", "xpos_scale_base", "layer_types", "sliding_window", "stride", "stride_block", "shift_keys"),
    "far_positions",
)


@dataclass
class _Read:
    """Embeddings (B, T, dim) that were read from ``position`` on, and their padding."""

    position: int
    x: Tensor
    padding: Tensor | None

    def until(self, end: int) -> _Read:
        length = end - self.position
        padding = None if self.padding is None else self.padding[:, :length]
        return _Read(self.position, self.x[:, :length], padding)


# Caches of the running call of ``generate`` whose steps may be captured; None outside.
_generating: ContextVar[list[LongNetCache] | None] = ContextVar("_generating", default=None)


@contextmanager
def generating() -> Iterator[None]:
    """A call of ``generate``: caches that :func:`capture_in_generate` was given capture steps inside, and forget them after."""
    caches: list[LongNetCache] = []
    token = _generating.set(caches)
    try:
        yield
    finally:
        _generating.reset(token)
        for cache in caches:
            cache._stop_capturing()


def capture_in_generate(cache: LongNetCache) -> None:
    """Let steps of one token be replayed from a CUDA graph, on a GPU, until the running call of ``generate`` ends.

    A graph repeats what was captured: only inside that call can the model be taken not to change.
    """
    caches = _generating.get()
    if caches is not None:
        caches.append(cache)
        cache._captures = True


class LongNetCache(Cache):
    """What a LongNet remembers of the tokens it has read, as ``past_key_values``: at most w / r keys a head in a branch (w, r).

    It is made on the first read, for the batch that is read. Logits with it are those of one forward over everything read.
    It is pickled, and saved by ``torch.save``, without its model: a model of the same config (weights are not compared)
    goes on from it.

    Args:
        max_length: how many tokens will be read at most: the cache is smaller where segments are longer. None reads forever.
        rewindable: whether :meth:`crop` can go back over the end of a segment, as assisted generation and prompt lookup need
            it, also in a cache that was saved. Keys that were written over cannot come back, so states some hundred tokens
            apart are kept, with the embeddings read since, which are then read again.
    """

    # PEFT's prefix tuning asks for it before the model refuses its keys: no limit.
    max_cache_len = -1

    def __init__(self, max_length: int | None = None, *, rewindable: bool = False) -> None:
        super().__init__(layers=[])
        self.max_length, self.rewindable = max_length, rewindable
        self._plain: PlainCache | None = None
        # Weak: a deep copy of a cache is a cheap way to go on from one prompt twice, and must not copy the model.
        self._stack: weakref.ref[LongNetBase] | None = None
        self._shared: dict[str, Any] = {}
        self._states: list[PlainCache] = []
        self._since: list[_Read] = []
        self._step: CapturedStep | None = None
        self._captures = False

    @property
    def is_linear(self) -> list[bool]:
        """transformers 5.24 takes a cache without layers for one of linear attention, and reads the prompt into it again."""
        return [False]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; the same after any number of tokens, from the first on."""
        return 0 if self._plain is None else self._plain.nbytes

    def read(self, stack: LongNetBase, x: Tensor, padding: Tensor | None, states: list[Tensor] | None = None) -> Tensor:
        """Hidden states of the next tokens, embedded as x (B, T, dim); ``states`` as in ``LongNetBase.run_blocks``.

        Raises:
            ValueError: another model or batch than before, more than ``max_length`` tokens, no token, or padding after a
                row's first real token.
        """
        if x.shape[1] == 0:
            raise ValueError(f"inputs of shape {tuple(x.shape)} with a cache: expected at least one token to read")
        if self.max_length is not None and self.get_seq_length() + x.shape[1] > self.max_length:
            raise ValueError(
                f"{x.shape[1]} tokens after {self.get_seq_length()}: expected no more than max_length={self.max_length}"
            )
        if self._plain is None:
            self._plain = make_cache(stack, stack.config, x.shape[0], max_length=self.max_length)
            self._bind(stack, {})
        elif self._stack is None:
            # Unpickled.
            self._bind(stack, self._shared)
        elif self._stack() is not stack:
            raise ValueError("past_key_values was read by another model: expected a LongNetCache of this one")
        if self._is_behind():
            self._read_again(stack)
        position = self._plain.position
        single = position > 0 and x.shape[1] == 1 and padding is None
        if self._captures and single and states is None and not self.rewindable:
            return self._step_of(stack, x)(x)
        if self.rewindable and (not self._states or position - self._states[-1].position >= _STRIDE):
            self._states = [*self._states[-1:], self._plain.clone()]
            self._since = [read for read in self._since if read.position >= self._states[0].position]
        with torch.no_grad(), self._plain.reading():
            if padding is not None:
                self._plain.place_rows(padding)
            hidden = stack.run_blocks(x, padding, self._plain, states=states)
            if self.rewindable:
                self._since.append(_Read(position, x.detach(), padding))
        return hidden

    def _step_of(self, stack: LongNetBase, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What reads a token: captured in a graph, if its steps can be."""
        plain = self._plain
        assert plain is not None

        def read(x: Tensor) -> Tensor:
            with torch.no_grad(), plain.reading():
                return stack.run_blocks(x, None, plain)

        if self._step is None:
            if not can_capture(stack, x.device):
                self._stop_capturing()
                return read
            self._step = CapturedStep(read, plain, x, [])
        step = self._step
        # The next step writes over what a graph gave.
        return lambda x: step(x).clone()

    def _stop_capturing(self) -> None:
        """From here on steps are read as they are: something changes that a graph would not see."""
        self._step, self._captures = None, False

    def _bind(self, stack: LongNetBase, before: dict[str, Any]) -> None:
        shared = {name: getattr(stack.config, name) for name in _SHARED}
        differ = [name for name in before if shared[name] != before[name]]
        if differ:
            said = [", ".join(f"{name}={values[name]}" for name in differ) for values in (before, shared)]
            raise ValueError(f"past_key_values was read by a model of {said[0]}: expected {said[1]}, as in this model")
        self._stack, self._shared = weakref.ref(stack), shared

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stack": None, "_step": None, "_captures": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> LongNetCache:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy({**self.__getstate__(), "_stack": self._stack}, memo))
        return copied

    def activate_past_recording(self) -> None:
        """What transformers calls before it takes tokens back: ``rewindable`` from here on."""
        self.rewindable = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; their number is given as a negative one, as transformers does.

        Over the end of a segment it goes back to a state before, and the next read begins with what was read since.

        Raises:
            ValueError: a number above 0, more tokens than there are, over the end of a segment without ``rewindable``, or
                further back than is remembered.
        """
        self._stop_capturing()
        position = self.get_seq_length()
        # transformers 5.17 counts on the device.
        keep = position + int(tokens_to_remove)
        if not 0 <= keep <= position:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: expected {-position} to 0, less than nothing is kept"
            )
        if self._plain is None or keep == position:
            return
        # Later states have read what never was.
        states = [state for state in self._states if state.position <= keep]
        since = [read.until(keep) for read in self._since if read.position < keep]
        if not self._is_behind() and all(layer.holds(keep) for layer in self._plain.layers):
            # No segment has ended since: rows after the position are written before they are read.
            with self._plain.writing():
                self._plain.moved(keep - position)
                self._states, self._since = states, since
            return
        if not self.rewindable:
            raise ValueError(
                f"crop to {keep} of {position} tokens: a segment has ended since and was written over; expected "
                "LongNetCache(rewindable=True)"
            )
        if not states:
            oldest = self._states[0].position if self._states else position
            raise ValueError(f"crop to {keep} tokens: expected at least {oldest}, the oldest state kept")
        self._plain, self._states, self._since = states[-1], states, since

    def _is_behind(self) -> bool:
        """Whether it stands at a state to which it went back, and what was read from there on is to be read again."""
        return any(state is self._plain for state in self._states)

    def _read_again(self, stack: LongNetBase) -> None:
        assert self._plain is not None
        plain = self._plain.clone()
        with torch.no_grad():
            for read in self._since:
                if read.position >= self._plain.position:
                    if read.padding is not None:
                        plain.place_rows(read.padding)
                    stack.run_blocks(read.x, read.padding, plain)
        self._plain = plain

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        if self._plain is None:
            return 0
        return max([self._plain.position, *(read.position + read.x.shape[1] for read in self._since[-1:])])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """``max_length``, or -1 for no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on from what row ``beam_idx[b]`` has read."""
        if self._plain is None:
            return
        self._stop_capturing()
        with self._plain.writing():
            for plain in {id(plain): plain for plain in (self._plain, *self._states)}.values():
                plain.reorder(beam_idx)
            self._since = [
                _Read(read.position, read.x[beam_idx], None if read.padding is None else read.padding[beam_idx])
                for read in self._since
            ]

    def reset(self) -> None:
        """Forget everything: the next token is the first, of any batch."""
        self._plain, self._stack, self._states, self._since = None, None, [], []
        self._stop_capturing()

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("a LongNetCache was given to another model: expected a LongNet of longnet.hf")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError(
            f"repeats={repeats}: a LongNetCache keeps its batch; expected inputs repeated before they are read"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError(f"{len(indices)} rows selected: a LongNetCache keeps its batch; expected reorder_cache")

    @property
    def batch_size(self) -> int:
        """Rows that are read side by side, -1 before the first read."""
        return -1 if self._plain is None else self._plain.layers[0].batch_size

    @property
    def is_initialized(self) -> bool:
        return self._plain is not None

    def __repr__(self) -> str:
        return f"LongNetCache(position={self.get_seq_length()}, nbytes={self.nbytes})"
