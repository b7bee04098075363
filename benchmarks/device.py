"""The device as the benchmark sees it: a clock, a memory meter, graph capture and torch's own dense attention."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.cases import Tensors

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Device(Protocol):
    """What the suites need of a device. Times are seconds between two marks of :meth:`start` and :meth:`stop`."""

    kind: str  # "cpu" or "cuda"
    device: torch.device
    cache_bytes: int
    queues: bool  # calls return before their work is done
    counts_tensors: bool  # memory is that of tensors; otherwise that of the whole process

    def describe(self) -> dict[str, Any]: ...  # what identifies the device in a result
    def start(self) -> Any: ...  # a mark before a call
    def stop(self) -> Any: ...  # a mark after a call
    def seconds(self, start: Any, stop: Any) -> float: ...  # between two marks, after finish()
    def finish(self) -> None: ...  # wait until all queued work is done
    def occupy(self) -> None: ...  # queue some milliseconds of work, during which the host launches what is timed
    def capture(self, function: Callable[[], object]) -> Callable[[], object]: ...  # as a graph, replayed by a call
    def release(self) -> None: ...  # return unused memory
    def allocated(self) -> int: ...  # bytes in use now
    def reset_peak(self) -> None: ...
    def peak(self) -> int: ...  # most bytes in use since reset_peak()

    def attend(self, tensors: Tensors, is_causal: bool) -> tuple[Any, ...]:
        """torch's fastest dense attention without autograd, (B, H, N, D): out, lse and what the backward pass needs."""

    def attend_backward(self, tensors: Tensors, saved: tuple[Any, ...], is_causal: bool) -> tuple[Tensor, ...]:
        """Gradients of query, key and value, from what :meth:`attend` returned."""


class Cpu:
    """This machine's processor. Memory is Linux's high-water mark of resident memory (VmHWM).

    It sees what kernels allocate inside torch too, which no allocator statistic of torch does on a CPU.
    """

    kind, queues, counts_tensors = "cpu", False, False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        # Inputs are not rotated: a call is longer than it takes to load them.
        self.cache_bytes = 0

    def describe(self) -> dict[str, Any]:
        """The model as the system names it, cores that this process may use, torch's threads, the load before the run."""
        model = _fields(Path("/proc/cpuinfo")).get("model name") or platform.processor() or "unknown"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {
            "kind": "cpu", "model": model, "capability": torch.backends.cpu.get_cpu_capability(), "cores": cores,
            "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
            "load_average": load_average(),
        }  # fmt: skip

    def start(self) -> float:
        return time.perf_counter()

    stop = start

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def finish(self) -> None:
        return None

    def occupy(self) -> None:
        return None

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        return function

    def release(self) -> None:
        gc.collect()
        if sys.platform == "linux":
            # Freed memory that malloc holds would be used again without being seen.
            ctypes.CDLL(None).malloc_trim(0)

    def allocated(self) -> int:
        return _resident("VmRSS")

    def reset_peak(self) -> None:
        _CLEAR.write_text("5")

    def peak(self) -> int:
        return _resident("VmHWM")

    def attend(self, tensors: Tensors, is_causal: bool) -> tuple[Any, ...]:
        return tuple(_cpu_forward(*tensors.inputs, 0.0, is_causal))

    def attend_backward(self, tensors: Tensors, saved: tuple[Any, ...], is_causal: bool) -> tuple[Tensor, ...]:
        return tuple(_cpu_backward(tensors.grad_out, *tensors.inputs, *saved, 0.0, is_causal))


class Cuda:
    """The current CUDA device. Dense attention is cuDNN's."""

    kind, queues, counts_tensors = "cuda", True, True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = int(self._properties.L2_cache_size)
        self._matrix: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        one = self._properties
        return {
            "kind": "cuda", "model": one.name, "capability": f"{one.major}.{one.minor}",
            "multiprocessors": one.multi_processor_count, "memory_bytes": one.total_memory,
            "cache_bytes": self.cache_bytes,
        }  # fmt: skip

    def start(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    stop = start

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def occupy(self) -> None:
        if self._matrix is None:
            self._matrix = torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16)
        for _ in range(3):
            torch.mm(self._matrix, self._matrix)

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
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

    def attend(self, tensors: Tensors, is_causal: bool) -> tuple[Any, ...]:
        return tuple(_cudnn_forward(*tensors.inputs, None, True, 0.0, is_causal, False))

    def attend_backward(self, tensors: Tensors, saved: tuple[Any, ...], is_causal: bool) -> tuple[Tensor, ...]:
        out, lse, *shapes, seed, offset = saved[:8]
        given = (tensors.grad_out, *tensors.inputs)
        return tuple(_cudnn_backward(*given, out, lse, seed, offset, None, *shapes, 0.0, is_causal))


class HostClock(Cpu):
    """The host's clock around work on ``device``: launch overhead included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def start(self) -> float:
        self.finish()
        return time.perf_counter()

    stop = start

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def here() -> Device:
    """A GPU where there is one, else the CPU."""
    return Cuda() if torch.cuda.is_available() else Cpu()


def no_cuda_reason() -> str | None:
    """Why there is no CUDA device to measure, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    return "torch sees no CUDA device: run it on a machine with an NVIDIA GPU (nvidia-smi lists it)"


def no_peak_reason() -> str | None:
    """Why a CPU's peak memory cannot be measured here, or None."""
    if sys.platform != "linux":
        return f"it needs Linux's /proc/self/clear_refs, and this is {sys.platform}"
    try:
        Cpu().reset_peak()
    except OSError as error:
        return f"/proc/self/clear_refs cannot be written: {error.strerror}"
    return None


def load_average() -> float:
    """Processes that ran or waited to, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(_fields(_STATUS)[field].split()[0]) * 1024


def _fields(path: Path) -> dict[str, str]:
    """The first value of every name in a file of lines ``name: value``; nothing where there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}
