"""Compile the kernels of a single token for GPUs, on any machine; says what came out. Run by ``test_band_step``."""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longnet.attention.streaming import band_kernels as kernels

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": (
        "*bf16",
        {
            "SHARE": 1,
            "SHARE_BLOCK": 16,
            "PRODUCTS": True,
            "D": 64,
            "D_BLOCK": 64,
            "ROWS": 64,
            "BY_ROW": True,
            "DILATED": False,
        },
    ),
    "shared": (
        "*bf16",
        {
            "SHARE": 4,
            "SHARE_BLOCK": 16,
            "PRODUCTS": True,
            "D": 256,
            "D_BLOCK": 256,
            "ROWS": 32,
            "BY_ROW": False,
            "DILATED": True,
        },
    ),
    "single": (
        "*fp32",
        {
            "SHARE": 3,
            "SHARE_BLOCK": 4,
            "PRODUCTS": False,
            "D": 20,
            "D_BLOCK": 32,
            "ROWS": 32,
            "BY_ROW": True,
            "DILATED": True,
        },
    ),
}


def assembler(name: str, case: str, target: int) -> str:
    """The kernel's PTX."""
    kind, constants = CASES[case]
    constants = constants | {
        "KIND": tl.float32,
        "SCALE": 0.125, "BANDS": 2, "PARTS": 64,
    }  # fmt: skip
    integers = {"POSITION", "SEEN", "PADDING", "OFFSETS", "READERS"}
    types: dict[str, Any] = dict.fromkeys(integers, "*i64") | dict.fromkeys(("MEMBERS", "OF_HEADS"), "*i32")
    types |= dict.fromkeys(("q_at", "k_at", "v_at", "out_at"), ("i64", "i64")) | {"cache_rows": "i64"}
    types |= dict.fromkeys(("parts", "tiles", "heads"), "i32")
    if name == "parts":
        types |= {"OUT": "*fp32", "LSE": "*fp32", "PARTS": "*i32"}
        constants.pop("PARTS")
    else:
        types |= {"OUT_PARTS": "*fp32", "LSE_PARTS": "*fp32", "OUT": kind, "LSE": "*fp32"}
    function = {"parts": kernels.parts_kernel, "mix": kernels.mix_bands_kernel}[name]
    own = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {key: "constexpr" if key in own else types.get(key, kind) for key in function.arg_names}
    compiled: Any = triton.compile(
        ASTSource(function, signature, own),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    assert len(compiled.asm["cubin"]) > 1000
    # What a program may have on GPUs from compute capability 8.0 on.
    assert compiled.metadata.shared <= 160 * 1024
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    for case in CASES:
        for target in (80, 90):
            parts = assembler("parts", case, target)
            assembler("mix", case, target)
            sys.stdout.write(f"{case} {target} {parts.count('mma')} {parts.count('.local')}\n")
