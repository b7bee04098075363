"""Compile the general kernels for GPUs that are not here. Run by ``test_cards``.

    python tests/backends/card_compile.py            # everything: half an hour
    python tests/backends/card_compile.py nest,query,128,bfloat16,86

A line for each kernel: kind of launch, kernel, head dimension, type, compute capability, bytes of shared memory that a program
takes and that it may have, and matrix products.
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

from longnet.attention.backends.triton import backend, bands, bias, launches
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
# Pattern, and whether it is causal.
BANDS = {
    "stride": (Pattern.compose(None, 4, window=512, dilated_queries=False, dilation_block=32), True),
    "rows": (Pattern.compose(1024, 2, dilation_block=16), False),
}
SIZES: Any = launches.Sizes("i32", "i32", "i32", "fp32", "i32", "i32", "i64")  # type: ignore[arg-type]
BAND_SIZES: Any = bands.BandSizes("i32", "i32", "i32", "fp32", "i32", "i64")  # type: ignore[arg-type]
TYPES: dict[str, Any] = {
    "C": "constexpr", "OFFSETS": "*i64", "LSE": "*fp32", "DELTA": "*fp32", "PADDING": "*i8", "BIAS": "*fp32",
    "PARTS": "*fp32", "padding_at": ("i32", "i32"), "bias_at": ("i32", "i32"),
}  # fmt: skip
# Everything that costs shared memory or registers is there.
FLAGS = {"BY_ROW": True, "PADDED": True, "MERGE": True}

# (function, constants, types of its own arguments, options) of a launch.
Launch = tuple[Any, Any, dict[str, Any], dict[str, int]]


def launches_of(kind: str, kernel: str, dim: int, dtype: torch.dtype, capability: int) -> Iterator[Launch]:
    """Those of a nest of two branches, of bands, or of the gradient of a relative bias."""
    channels, precision = (dim, launches.power_of_two(dim)), "ieee" if dtype == torch.float32 else "tf32"
    of_nest = {
        "BLOCKED": False,
        "OFFSET": True,
        "CAUSAL": True,
        "BIASED": kind == "bias",
        "PRECISION": precision,
        **FLAGS,
    }
    if kind == "bias":
        size, warps = bias.bias_block(64, dim, dtype)
        whole = {name: "i32" for name in bias_kernel.arg_names if name.islower() and not name.endswith("_at")}
        settings = launches.Settings(*channels, size, size, 1, 1, WEIGHTED=False, **of_nest)
        yield bias_kernel, settings, whole | {"scale": "fp32"}, {"num_warps": warps}
        return
    blocks = backend.blocks_for(kernel, dim, dtype, SHARED[capability] * 1024)
    if kind == "nest":
        function = getattr(forward if kernel == "forward" else backward, f"{kernel}_kernel")
        for one in launches.plan_launches(make_nests(NEST, 16, 64, 64), False, 131072, 0, blocks):
            cut = cut_of(one.blocks, kernel)
            settings = launches.Settings(*channels, *cut, one.period, one.weighted, **of_nest, COPIES=one.blocks.copies)
            shape = launches.NestShape(*(tuple("i32" for _ in numbers) for numbers in one.shape))
            yield function, settings, {"nest": shape, "sizes": SIZES}, one.blocks.options
        return
    pattern, is_causal = BANDS[kind]
    (band,) = bands.band_launches(pattern, True)
    band = band.by_band[-1] if kernel == "key_value" else band
    of_band = bands.BandSettings(
        *channels, *cut_of(blocks, kernel), **band.constants(pattern), CAUSAL=is_causal, PRECISION=precision, **FLAGS
    )
    yield getattr(band_kernels, f"band_{kernel}_kernel"), of_band, {"sizes": BAND_SIZES}, blocks.options


def cut_of(blocks: launches.Blocks, kernel: str) -> tuple[int, int, int]:
    """(rows of queries, rows of keys, stages)."""
    rows = (blocks.swept, blocks.owned) if kernel == "key_value" else (blocks.owned, blocks.swept)
    return *rows, blocks.stages


def compiled(kind: str, kernel: str, dim: int, dtype: str, capability: int) -> tuple[int, int]:
    """(bytes of shared memory of a program, matrix products), the most and the fewest of its launches."""
    found = []
    for function, settings, types, options in launches_of(kind, kernel, dim, DTYPES[dtype], capability):
        tensor = "*bf16" if dtype == "bfloat16" else "*fp32"
        known = TYPES | types
        signature = {n: known.get(n, ("i32",) * 3 if n.endswith("_at") else tensor) for n in function.arg_names}
        # Pointers and strides are multiples of 16 bytes, as in most calls: copies through shared memory need it.
        aligned: dict[tuple[int, ...], Any] = {}
        for place, (name, kind_of) in enumerate(signature.items()):
            if isinstance(kind_of, str) and kind_of.startswith("*"):
                aligned[(place,)] = [["tt.divisibility", 16]]
            elif name.endswith("_at"):
                aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(len(kind_of))}
        source = ASTSource(function, signature, {"C": settings}, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        products = sum(made.asm["ptx"].count(name) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
        found.append((int(made.metadata.shared), products))
    return max(shared for shared, _ in found), min(products for _, products in found)


if __name__ == "__main__":
    kernels = [*itertools.product(("nest", *BANDS), KERNELS), ("bias", "gradient")]
    every = [(*one, *rest) for one in kernels for rest in itertools.product((64, 128, 256), DTYPES, SHARED)]
    named = [tuple(word.split(",")) for word in sys.argv[1:]]
    for kind, kernel, dim, dtype, capability in named or every:
        taken, products = compiled(kind, kernel, int(dim), dtype, int(capability))
        there = SHARED[int(capability)] * 1024
        sys.stdout.write(f"{kind} {kernel} {dim} {dtype} {capability} {taken} {there} {products}\n")
        sys.stdout.flush()
