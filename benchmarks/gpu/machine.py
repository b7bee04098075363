"""The device as the benchmark sees it: a clock, a memory meter, and torch's own dense attention."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


class Machine(Protocol):
    """What the sections need of a device; :class:`Cuda` is the one that is measured."""

    device: torch.device
    cache_bytes: int

    def describe(self) -> dict[str, Any]:
        """What identifies the device in a result."""
        ...

    def mark(self) -> Any:
        """A point in the device's queue of work."""
        ...

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two marks that :meth:`finish` has passed."""
        ...

    def finish(self) -> None:
        """Wait until all work given to the device is done."""
        ...

    def occupy(self) -> None:
        """Give the device some milliseconds of work, in which the host can queue what is to be timed."""
        ...

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """What the function gives the device to do, to be given again by one call."""
        ...

    def release(self) -> None:
        """Hand back all memory that nothing holds."""
        ...

    def allocated(self) -> int:
        """Bytes that tensors hold now."""
        ...

    def reset_peak(self) -> None:
        """Start a new measurement of :meth:`peak`."""
        ...

    def peak(self) -> int:
        """Most bytes that tensors held at one time since :meth:`reset_peak`."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Any, ...]:
        """torch's fastest dense attention, bare, on (B, H, N, D): out, lse and whatever the backward pass needs."""
        ...

    def attend_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: tuple[Any, ...], is_causal: bool
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key and value, from what :meth:`attend` returned."""
        ...


def why_no_cuda() -> str | None:
    """Why there is nothing to measure here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    return "torch sees no CUDA device: run it on a machine with an NVIDIA GPU (nvidia-smi lists it)"


class Cuda:
    """The current CUDA device. Dense attention is cuDNN's."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = int(self._properties.L2_cache_size)
        self._matrix: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        one = self._properties
        return {
            "kind": "cuda",
            "model": one.name,
            "capability": f"{one.major}.{one.minor}",
            "multiprocessors": one.multi_processor_count,
            "memory_bytes": one.total_memory,
            "cache_bytes": self.cache_bytes,
        }

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def occupy(self) -> None:
        if self._matrix is None:
            self._matrix = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
        for _ in range(3):
            torch.mm(self._matrix, self._matrix)

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def release(self) -> None:
        self._matrix = None
        gc.collect()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Any, ...]:
        return tuple(_forward(query, key, value, None, True, 0.0, is_causal, False))

    def attend_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: tuple[Any, ...], is_causal: bool
    ) -> tuple[Tensor, ...]:
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset = saved[:8]
        shapes = (cum_q, cum_k, max_q, max_k)
        return tuple(_backward(grad_out, query, key, value, out, lse, seed, offset, None, *shapes, 0.0, is_causal))
