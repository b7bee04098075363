"""Compile the Hopper kernels for their GPU, on any machine; says what came out. Run by ``test_hopper_compiles``."""

from __future__ import annotations

import re
import sys
from collections.abc import Set
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from longnet.attention.backends.triton import bands, hopper, hopper_bands
from longnet.attention.backends.triton.kernels import hopper_bands as band_kernels
from longnet.geometry import Branch, Pattern
from longnet.geometry.nests import Nest

LENGTH = 45_681
# The last is the offset of the grid, None where each row of the batch has its own.
CASES: dict[str, tuple[int, int, bool, tuple[tuple[int, int], ...], int | None]] = {
    "nest": (64, 48, False, ((1024, 1), (32768, 4)), 0),
    "branch": (64, 64, True, ((5792, 2),), None),
    "wide": (128, 96, True, ((1024, 1), (4096, 2), (16384, 4)), 5),
}


BANDS = {
    "window": (64, 64, Pattern.compose(window=512)),
    "stride": (64, 48, Pattern.compose(None, 4, window=512, dilated_queries=False)),
    "blocks": (128, 128, Pattern.compose(None, 2, window=512, dilated_queries=False, dilation_block=32)),
}


def compiled(kernel: str, case: str, *, padded: bool = False) -> Any:
    dim, channels, is_causal, branches, offset = CASES[case]
    function, owned = hopper._kernel(kernel)
    swept, stages, _ = hopper._CUTS[kernel, dim]
    nest = Nest(tuple(Branch(*branch) for branch in branches))
    tiles, shape = hopper._shape(nest, LENGTH)
    limited = kernel == "key_value" and not is_causal
    settings = hopper.Constants(
        shape, tiles, dim, channels, hopper._OWNED, swept, stages, True, is_causal,
        MERGE=True, LIMITED=limited, OFFSET=offset != 0, BY_ROW=offset is None, PADDED=padded,
    )  # fmt: skip
    letters = [name[0] for name in function.arg_names if name.endswith("_fold")]
    rows = {letter: [hopper._OWNED if i in owned else swept] * len(branches) for i, letter in enumerate(letters)}
    return _compiled(function, settings, rows, dim, set() if offset else {"segment_offset"})


def compiled_band(kernel: str, case: str, *, padded: bool = False) -> Any:
    dim, channels, pattern = BANDS[case]
    (launch,) = bands.band_launches(pattern, True)
    of_keys = kernel == "key_value"
    launch = launch.by_band[-1] if of_keys else launch
    settings = hopper_bands.constants_of(
        launch, pattern, kernel, dim, channels, is_causal=True, merge=True, by_row=case == "blocks", padded=padded
    )
    own, swept = hopper._OWNED, settings.N
    of_queries = [swept if of_keys else own]
    of_bands = [hopper_bands.rows_of_copy(band, own if of_keys else swept) for band in launch.bands]
    function = getattr(band_kernels, f"hopper_band_{kernel}_kernel")
    return _compiled(function, settings, {"q": of_queries, "g": of_queries, "k": of_bands, "v": of_bands}, dim)


def _compiled(
    function: Any, settings: Any, rows: dict[str, list[int]], dim: int, absent: Set[str] = frozenset()
) -> object:
    """``rows``: of the copies by each descriptor, by the first letter of its name. Arguments that are ``absent`` are None."""
    constants: dict[str, object] = {"C": settings} | dict.fromkeys(absent)
    if not settings.BY_ROW:
        constants["OFFSETS"] = None
    if not settings.PADDED:
        constants |= dict.fromkeys({"PADDING", "COUNTS", "padding_at"} & set(function.arg_names))
    signature: dict[str, object] = {}
    for name in function.arg_names:
        if re.fullmatch("[qkvg][0-4]", name):
            if int(name[1]) >= len(rows[name[0]]):
                constants[name] = None
            else:
                block = [rows[name[0]][int(name[1])], dim]
                layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
                signature[name] = f"tensordesc<fp16{block},{layout!r}>"
        elif name in ("OUT", "GRAD_Q", "GRAD_K", "GRAD_V"):
            signature[name] = "*fp16"
        elif name in ("LSE", "DELTA"):
            signature[name] = "*fp32"
        elif name.endswith("_fold"):
            signature[name] = ("i32",) * 4
        elif name.endswith("_at"):
            signature[name] = ("i32",) * (2 if name == "padding_at" else 3)
        else:
            signature[name] = {
                "ORDER": "*i32", "LIMITS": "*i32", "OFFSETS": "*i64", "PADDING": "*i8", "COUNTS": "*i32", "scale": "fp32",
            }.get(name, "i32")  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(function, {name: signature[name] for name in function.arg_names}, constants, {})
    options = {"num_warps": 4, "maxnreg": hopper._REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for kernel in ("forward", "key_value", "query"):
        for case in sys.argv[1:]:
            name, padded = case.removeprefix("padded-"), case.startswith("padded-")
            asm = (compiled if name in CASES else compiled_band)(kernel, name, padded=padded).asm
            sys.stdout.write(f"{kernel} {case} {asm['ptx'].count('wgmma.mma_async')} {len(asm['cubin'])}\n")
