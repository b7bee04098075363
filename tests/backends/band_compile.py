"""Compile the band kernels for GPUs, on any machine; says what came out. Run by ``test_triton_bands``."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longnet.attention.backends.triton import bands
from longnet.attention.backends.triton.kernels import bands as kernels
from longnet.geometry import Pattern

CASES = {
    # Pattern, causal, padded, an offset for each row, mixed into what is there.
    "stride": (
        Pattern.compose(None, 4, window=512, dilated_queries=False, dilation_block=32),
        True,
        False,
        False,
        False,
    ),
    "rows": (Pattern.compose(1024, 2, dilation_block=16), False, True, True, True),
}
TYPES: dict[str, Any] = {
    "C": "constexpr",
    "OFFSETS": "*i64",
    "LSE": "*fp32",
    "DELTA": "*fp32",
    "PADDING": "*i8",
    "padding_at": ("i64", "i64"),
    "sizes": bands.BandSizes("i32", "i32", "i32", "fp32", "i32", "i64"),  # type: ignore[arg-type]
}


def products(kernel: str, case: str, target: int) -> int:
    """How many matrix products a compiled kernel has."""
    pattern, is_causal, padded, by_row, merge = CASES[case]
    (launch,) = bands.band_launches(pattern, True)
    if kernel == "key_value":
        launch = launch.by_band[-1]
    settings = bands.BandSettings(
        64, 64, 64, 64, 2, **launch.constants(pattern), BY_ROW=by_row, CAUSAL=is_causal, PADDED=padded,
        MERGE=merge, PRECISION="tf32",
    )  # fmt: skip
    function = getattr(kernels, f"band_{kernel}_kernel")
    signature = {
        name: TYPES.get(name, ("i64",) * 3 if name.endswith("_at") else "*bf16") for name in function.arg_names
    }
    compiled = triton.compile(
        ASTSource(function, signature, {"C": settings}),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": 4, "num_stages": 2},
    )
    assert len(compiled.asm["cubin"]) > 1000
    return compiled.asm["ptx"].count("wgmma.mma_async" if target == 90 else "mma.sync")


if __name__ == "__main__":
    for case, target in (("stride", 90), ("rows", 80)):
        for kernel in ("forward", "query", "key_value"):
            sys.stdout.write(f"{kernel} {case} {target} {products(kernel, case, target)}\n")
