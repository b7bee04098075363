"""Triton's driver for NVIDIA GPUs without a GPU: kernels are compiled for sm_90, and launches are written down.

For programs of their own (``tests/compiled.py``). All but what is written in C is Triton's: its launcher and its descriptors.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver


class LaunchFunction:
    """The C function that launches: what it was given, newest last."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Utils:
    """What Triton calls in C, besides the launch."""

    def __init__(self, launch: LaunchFunction) -> None:
        self.launch = launch
        self.encoded = 0

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return "module", 4242, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def build_signature_metadata(self, signature: list[str]) -> tuple[str, ...]:
        return tuple(signature)

    def fill_tma_descriptor(self, *form: Any) -> tuple[Any, ...]:
        self.encoded += 1
        return "descriptor", *(tuple(one) if isinstance(one, list) else one for one in form)

    fill_tma_descriptor_tiled = fill_tma_descriptor


class Driver:
    """Of a machine with one H200. ``launched`` is the C function."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        self.launched = LaunchFunction()
        self.utils = Utils(self.launched)
        self.stream = 7

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def activate(self) -> None:
        driver.set_active(self)
        # Triton 3.6 compiles a C function for each kernel; newer ones have one, and C objects for what it is given.
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=self.launched)
        nvidia.PyKernelArg = SimpleNamespace
