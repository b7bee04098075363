"""Steps of one token, replayed from a CUDA graph: hundreds of launches become one."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from longnet.models.cache import LongNetCache
from longnet.runtime.torch_internals import has_dispatch_modes, is_call_changed, is_transformed

_log = logging.getLogger("longnet")

# A capture takes as long as a few steps: it is not worth it for fewer tokens.
LEAST_TOKENS = 8
# Packages whose modules may be captured: their calls do nothing but launch kernels.
_KNOWN = ("torch.nn", "longnet.attention", "longnet.models", "longnet.nn")


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether a graph can stand for a step of this model; the log says why not.

    A graph repeats kernels and runs no Python: hooks, compiled or replaced modules and modes that look at operators are called,
    never passed over.
    """
    reason = _reason_against(model, device)
    if reason is not None:
        _log.debug("steps are not captured in a CUDA graph: %s", reason)
    return reason is None


def _reason_against(model: nn.Module, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"graphs are for cuda, not {device.type}"
    tensors = [*model.parameters(), *model.buffers()]
    if any(x.device != device for x in tensors):
        return "parts of the model are elsewhere"
    if any(type(x) not in (nn.Parameter, Tensor) for x in tensors):
        return "its weights are of other types than torch's own"
    for name, module in model.named_modules():
        if is_call_changed(module):
            return f"the module {name!r} is hooked, compiled or replaced"
        if replaced := [one for one in vars(module) if callable(getattr(type(module), one, None))]:
            return f"the module {name!r} has methods of its own: {replaced}"
        if not any(f"{type(module).__module__}.".startswith(f"{known}.") for known in _KNOWN):
            return f"the module {name!r} is of the unknown type {type(module).__qualname__}"
    if is_transformed() or has_dispatch_modes():
        return "a transform or a mode looks at its operators"
    return None


# The streams on which each thread captures, by device.
_STREAMS = threading.local()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's, always the same: torch keeps memory for cuBLAS for every stream that has been used."""
    streams = _STREAMS.__dict__
    key = str(device)
    if key not in streams:
        streams[key] = torch.cuda.Stream(device)
    stream: torch.cuda.Stream = streams[key]
    return stream


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing is collected inside: the end of another graph, which frees memory, would break a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CapturedStep:
    """``read`` of one token after the other. The first call runs it, the second captures it, and from then on it is replayed.

    Args:
        read: from tokens (B, 1), or what they are embedded as, to a tensor; it reads them into the cache, and draws from the
            ``generators``.
        tokens: of the first call.
    """

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        cache: LongNetCache,
        tokens: Tensor,
        generators: Sequence[torch.Generator | None],
    ) -> None:
        self._read, self._cache = read, cache
        self._generators = [one for one in generators if one is not None]
        self._tokens = torch.empty_like(tokens)
        self._stream = _side_stream(tokens.device)
        self._has_run = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = tokens

    def __call__(self, tokens: Tensor) -> Tensor:
        """What ``read`` gives for the next tokens (B, 1). The next call writes over it."""
        self._tokens.copy_(tokens)
        if not self._has_run:
            return self._run()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        self._cache.moved(1, on_device=False)
        return self._result

    def _run(self) -> Tensor:
        """Where it will be captured: kernels are compiled and workspaces made there."""
        current = torch.cuda.current_stream(self._tokens.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._read(self._tokens)
        current.wait_stream(self._stream)
        result.record_stream(current)
        self._has_run = True
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream(self._tokens.device)
        self._stream.wait_stream(current)
        # Not torch.cuda.graph, which waits for the device and collects garbage: that takes longer than the capture.
        with torch.cuda.stream(self._stream), _no_collection():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._result = self._read(self._tokens)
            except BaseException:
                # It can only say that the capture is broken.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        # The states of the generators have been set on the other stream: replays set them too.
        current.wait_stream(self._stream)
        # The capture has counted tokens and read none.
        self._cache.moved(-1, on_device=False)
        self._graph = graph
