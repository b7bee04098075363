"""Compile the general kernels for GPUs that are not here; says what shared memory they take. Run by ``test_cards``.

python tests/backends/card_compile.py            # every kernel, head dimension, type and architecture: half an hour
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longnet.attention.backends.triton import backend, bands, launches
from longnet.attention.backends.triton.kernels import backward, forward
from longnet.attention.backends.triton.kernels import bands as band_kernels
from longnet.attention.backends.triton.kernels.bias import bias_kernel
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests

# Shared memory of a program by compute capability, KiB (CUDA C++ programming guide, table of technical specifications).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KERNELS = ("forward", "query", "key_value")
NEST = Pattern.parse((2048, 4096), (1, 2))
BANDS = Pattern.compose(None, 4, window=512, dilated_queries=False, dilation_block=32)
TYPES: dict[str, Any] = {
    "C": "constexpr", "OFFSETS": "*i64", "LSE": "*fp32", "DELTA": "*fp32", "PADDING": "*i8", "BIAS": "*fp32",
    "padding_at": ("i32", "i32"), "bias_at": ("i32", "i32"),
}  # fmt: skip


def nest_kernels(kernel: str, dim: int, dtype: torch.dtype, capability: int) -> Iterator[tuple[Any, ...]]:
    """(function, constants, types of its own, warps) of every launch of a nest."""
    nests = make_nests(NEST, 16, 64, 64)
    blocks = backend.blocks_for(kernel, dim, dtype, SHARED[capability] * 1024)
    function = getattr(forward if kernel == "forward" else backward, f"{kernel}_kernel")
    for launch in launches.plan_launches(nests, False, 131072, 0, blocks):
        cut = launch.blocks
        rows = (cut.swept, cut.owned) if kernel == "key_value" else (cut.owned, cut.swept)
        settings = launches.Settings(
            dim, launches.power_of_two(dim), *rows, cut.stages, launch.period, launch.weighted, BLOCKED=False, OFFSET=True,
            BY_ROW=True, CAUSAL=True, PADDED=True, BIASED=False, MERGE=True,
            PRECISION="ieee" if dtype == torch.float32 else "tf32",
        )  # fmt: skip
        shape = launches.NestShape(*(tuple("i32" for _ in one) for one in launch.shape))
        sizes = launches.Sizes("i32", "i32", "i32", "fp32", "i32", "i32", "i64")  # type: ignore[arg-type]
        yield function, settings, {"nest": shape, "sizes": sizes}, cut.warps


def band_launch(kernel: str, dim: int, dtype: torch.dtype, capability: int) -> Iterator[tuple[Any, ...]]:
    """As :func:`nest_kernels`, of a window and strided keys."""
    (launch,) = bands.band_launches(BANDS, True)
    if kernel == "key_value":
        launch = launch.by_band[-1]
    cut, _ = backend.blocks_for(kernel, dim, dtype, SHARED[capability] * 1024)
    rows = (cut.swept, cut.owned) if kernel == "key_value" else (cut.owned, cut.swept)
    settings = bands.BandSettings(
        dim, launches.power_of_two(dim), *rows, cut.stages, **launch.constants(BANDS), BY_ROW=True, CAUSAL=True, PADDED=True,
        MERGE=True, PRECISION="ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip
    sizes = bands.BandSizes("i32", "i32", "i32", "fp32", "i32", "i64")  # type: ignore[arg-type]
    yield getattr(band_kernels, f"band_{kernel}_kernel"), settings, {"sizes": sizes}, cut.warps


def bias_launch(kernel: str, dim: int, dtype: torch.dtype, capability: int) -> Iterator[tuple[Any, ...]]:
    """As :func:`nest_kernels`, of the gradient of a relative bias."""
    size = backend.bias_rows(dim, dtype)
    settings = launches.Settings(
        dim, launches.power_of_two(dim), size, size, 1, 1, WEIGHTED=False, BLOCKED=False, OFFSET=False, BY_ROW=False,
        CAUSAL=False, PADDED=True, BIASED=True, MERGE=False, PRECISION="ieee" if dtype == torch.float32 else "tf32",
    )  # fmt: skip
    whole = [name for name in bias_kernel.arg_names if name.islower() and not name.endswith("_at")]
    yield (
        bias_kernel,
        settings,
        {"PARTS": "*fp32", **dict.fromkeys(whole, "i32"), "scale": "fp32"},
        backend.bias_warps(size),
    )


MAKE = {"nest": nest_kernels, "band": band_launch, "bias": bias_launch}


def shared(kind: str, kernel: str, dim: int, dtype: str, capability: int) -> int:
    """Bytes of shared memory of a program: the most of its launches."""
    found = []
    for function, settings, types, warps in MAKE[kind](kernel, dim, DTYPES[dtype], capability):
        tensor = "*bf16" if dtype == "bfloat16" else "*fp32"
        known = TYPES | types
        signature = {n: known.get(n, ("i32",) * 3 if n.endswith("_at") else tensor) for n in function.arg_names}
        aligned: dict[tuple[int, ...], Any] = {}
        for place, (name, kind_of) in enumerate(signature.items()):
            if isinstance(kind_of, str) and kind_of.startswith("*"):
                aligned[(place,)] = [["tt.divisibility", 16]]
            elif name.endswith("_at"):
                aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(len(kind_of))}
        source = ASTSource(function, signature, {"C": settings}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        found.append(int(compiled.metadata.shared))
    return max(found)


if __name__ == "__main__":
    kernels = [*itertools.product(("nest", "band"), KERNELS), ("bias", "gradient")]
    every = [(*one, *rest) for one in kernels for rest in itertools.product((64, 128, 256), DTYPES, SHARED)]
    named = [tuple(word.split(",")) for word in sys.argv[1:]]
    for kind, kernel, dim, dtype, capability in named or every:
        taken = shared(kind, kernel, int(dim), dtype, int(capability))
        sys.stdout.write(f"{kind} {kernel} {dim} {dtype} {capability} {taken} {SHARED[int(capability)] * 1024}\n")
        sys.stdout.flush()
