"""Compile the Hopper kernels for their GPU, on any machine; says what came out. Run by ``test_hopper_compiles``."""

from __future__ import annotations

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from longnet.attention.backends.triton import hopper
from longnet.geometry import Branch
from longnet.geometry.nests import Nest

LENGTH = 45_681
CASES = {
    "nest": (64, 48, False, ((1024, 1), (32768, 4))),
    "branch": (64, 64, True, ((5792, 2),)),
    "wide": (128, 96, True, ((1024, 1), (4096, 2), (16384, 4))),
}


def compiled(kernel: str, case: str) -> object:
    dim, channels, is_causal, branches = CASES[case]
    function, owned = hopper._kernel(kernel)
    swept, stages, _ = hopper._CUTS[kernel, dim]
    nest = Nest(tuple(Branch(*branch) for branch in branches))
    tiles, shape = hopper._shape(nest, LENGTH)
    limited = kernel == "key_value" and not is_causal
    settings = hopper.Constants(
        shape, tiles, dim, channels, hopper._OWNED, swept, stages, True, is_causal, MERGE=True, LIMITED=limited
    )
    constants: dict[str, object] = {"C": settings}
    letters = [name[0] for name in function.arg_names if name.endswith("_fold")]
    signature: dict[str, object] = {}
    for name in function.arg_names:
        if re.fullmatch("[qkvg][0-4]", name):
            if int(name[1]) >= len(branches):
                constants[name] = None
            else:
                block = [hopper._OWNED if letters.index(name[0]) in owned else swept, dim]
                layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
                signature[name] = f"tensordesc<fp16{block},{layout!r}>"
        elif name in ("OUT", "GRAD_Q", "GRAD_K", "GRAD_V"):
            signature[name] = "*fp16"
        elif name in ("LSE", "DELTA"):
            signature[name] = "*fp32"
        elif name.endswith("_fold"):
            signature[name] = ("i32",) * 4
        elif name.endswith("_at"):
            signature[name] = ("i32",) * 3
        else:
            signature[name] = {"ORDER": "*i32", "LIMITS": "*i32", "scale": "fp32"}.get(name, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = GluonASTSource(function, {name: signature[name] for name in function.arg_names}, constants, {})
    options = {"num_warps": 4, "maxnreg": hopper._REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for kernel in ("forward", "key_value", "query"):
        for case in sys.argv[1:]:
            asm = compiled(kernel, case).asm
            sys.stdout.write(f"{kernel} {case} {asm['ptx'].count('wgmma.mma_async')} {len(asm['cubin'])}\n")
