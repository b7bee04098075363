"""Every Triton kernel with every feature on small shapes, for NVIDIA's compute-sanitizer on a GPU machine.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python scripts/sanitize.py
    compute-sanitizer --tool synccheck --error-exitcode 1 python scripts/sanitize.py

Without torch's memory cache every tensor is an allocation of its own, so that memcheck sees reads and writes past its
end. ``--only TEXT`` runs the cases whose name holds the text, ``--part 2/8`` the second of eight parts, for as many
processes side by side. Run it once without the sanitizer first: kernels are compiled then, and come from Triton's cache
afterwards.

On an H200 memcheck finds nothing (at 627476f; the training steps of models were not finished), synccheck nothing in the
kernels for Hopper (the others were not run under it), and racecheck nothing in the portable kernels. In those for Hopper
racecheck names the byte with which Triton tells its worker warps what to run (read and written with a barrier of the whole
block between), as it does in any kernel of two warp partitions that have barriers of their own.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longnet import LongNetConfig, LongNetLM, dilated_attention
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

PATTERNS = {
    "nest": Pattern.parse((64, 128, 256), (1, 2, 4)),
    "blocked nest": Pattern.parse((64, 256), (1, 2), "blocked"),
    "nothing nests": Pattern.parse((50, 130), (3, 7)),
    # Large enough for the kernels of Hopper GPUs, where there is one.
    "large nest": Pattern.parse((512, 1024), (1, 2)),
}
# Windows, strides and other grids.
BANDS: dict[str, dict[str, Any]] = {
    "window": {"segment_lengths": (), "dilation_rates": (), "window": 130},
    "stride": {"segment_lengths": (None,), "dilation_rates": (4,), "window": 96, "dilated_queries": False},
    "stride of blocks": {
        "segment_lengths": (None,), "dilation_rates": (2,), "window": 64, "dilated_queries": False, "dilation_block": 32,
    },
    "nest and window": {"segment_lengths": (512, 1024), "dilation_rates": (1, 2), "window": 200},
    "another grid": {"segment_lengths": (512, 1024), "dilation_rates": (1, 2), "segment_offset": 345},
}  # fmt: skip


@dataclass(frozen=True)
class Bands:
    """A call with a window, a stride or a grid of its own, forward and backward."""

    kind: str
    dtype: torch.dtype
    head_dim: int
    padding: str

    @property
    def name(self) -> str:
        return f"{self.kind} {str(self.dtype).removeprefix('torch.')} D={self.head_dim} padding: {self.padding}"

    def run(self) -> None:
        """Raises: AssertionError when a result is not finite."""
        batch, length = 2, 1062
        shapes = [(batch, length, heads, self.head_dim) for heads in (4, 2, 2)]
        q, k, v = (torch.randn(s, device="cuda", dtype=self.dtype).transpose(1, 2).requires_grad_() for s in shapes)
        mask = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
        if self.padding == "scattered":
            mask = torch.rand(batch, length, device="cuda") < 0.1
        mask[1, {"left": slice(600), "right": slice(700, None)}.get(self.padding, slice(0))] = True
        out = dilated_attention(
            q, k, v, **BANDS[self.kind], is_causal=True, key_padding_mask=None if self.padding == "none" else mask,
            backend="triton",
        )  # fmt: skip
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert all(x.isfinite().all() for x in (out, *grads)), f"{self.name}: a result is not finite"


@dataclass(frozen=True)
class Model:
    """A training step and a stream of a language model: norms, projections, rotation and the kernels of single tokens."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"model {str(self.dtype).removeprefix('torch.')}"

    def run(self) -> None:
        """Raises: AssertionError when a result is not finite."""
        config = LongNetConfig(
            layers=3, dim=256, heads=4, kv_heads=2, vocab_size=97, sliding_window=40, stride=4, shift_keys=True,
            layer_types=("sliding_attention", "strided_attention", "full_attention"),
        )  # fmt: skip
        model = LongNetLM(config).cuda()
        tokens = torch.randint(97, (2, 301), device="cuda")
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results = [loss, *(x.grad for x in model.parameters() if x.grad is not None)]
        assert all(x.isfinite().all() for x in results), f"{self.name}: a result is not finite"
        model.to(self.dtype).eval().generate(tokens[:, :50], 5, temperature=0)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward."""

    pattern: str
    dtype: torch.dtype
    head_dim: int
    is_causal: bool
    padded: bool = False
    biased: bool = False
    group: int = 1

    @property
    def name(self) -> str:
        features = [
            word for word, on in (("causal", self.is_causal), ("padded", self.padded), ("biased", self.biased)) if on
        ]
        kind = str(self.dtype).removeprefix("torch.")
        return " ".join([self.pattern, kind, f"D={self.head_dim}", f"group={self.group}", *features])

    def run(self) -> None:
        """Raises: AssertionError when a result is not finite."""
        pattern = PATTERNS[self.pattern]
        batch, heads, length = 2, 4, 1062 if self.pattern == "large nest" else 299
        shapes = [(batch, length, count, self.head_dim) for count in (heads, heads // self.group, heads // self.group)]
        q, k, v = (torch.randn(s, device="cuda", dtype=self.dtype).transpose(1, 2).requires_grad_() for s in shapes)
        reach = min(length, max(pattern.segment_lengths))
        bias = torch.randn(heads, 2 * reach - 1, device="cuda", requires_grad=True) if self.biased else None
        mask = torch.rand(batch, length, device="cuda") < 0.3 if self.padded else None
        out, lse = pattern_attention(
            q, k, v, pattern, is_causal=self.is_causal, key_padding_mask=mask, distance_bias=bias, return_lse=True,
            backend="triton",
        )  # fmt: skip
        wanted = [q, k, v, *([] if bias is None else [bias])]
        grads = torch.autograd.grad((out, lse), wanted, (torch.ones_like(out), torch.zeros_like(lse)))
        assert all(x.isfinite().all() for x in (out, *grads)), f"{self.name}: a result is not finite"


def cases() -> Iterator[Case | Bands | Model]:
    """All features on small shapes, then the dtypes and head dimensions that kernels are cut for."""
    switch = (False, True)
    for is_causal, padded, biased in itertools.product(switch, switch, switch):
        for pattern in ("nest", "blocked nest", "nothing nests"):
            yield Case(pattern, torch.float16, 64, is_causal, padded, biased, group=2 if padded else 1)
    for dtype, head_dim in itertools.product((torch.float32, torch.bfloat16), (16, 48, 64, 128, 256)):
        yield Case("nest", dtype, head_dim, is_causal=True, biased=True)
    for head_dim, is_causal in itertools.product((64, 128), (False, True)):
        yield Case("large nest", torch.bfloat16, head_dim, is_causal, group=head_dim // 64)
    for kind, (dtype, head_dim), padding in itertools.product(
        BANDS,
        ((torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 48)),
        ("none", "left", "right", "scattered"),
    ):
        yield Bands(kind, dtype, head_dim, padding)
    for dtype in (torch.float32, torch.bfloat16):
        yield Model(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--part", default="1/1", help="run every N-th case from the I-th on: I/N")
    arguments = parser.parse_args()
    only, (first, parts) = arguments.only, map(int, arguments.part.split("/"))
    # Branches of short segments nest as long ones do.
    triton_flash.LEAST_ROWS = 16
    torch.manual_seed(0)
    # Says which kernels a case ran.
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("longnet").setLevel(logging.DEBUG)
    chosen = [case for case in cases() if only in case.name]
    if not chosen:
        raise SystemExit(f"--only {only!r} leaves no case; names are like {next(cases()).name!r}")
    chosen = chosen[first - 1 :: parts]
    for case in chosen:
        case.run()
        torch.cuda.synchronize()
        print(case.name, flush=True)
    print(f"{len(chosen)} cases done")


if __name__ == "__main__":
    main()
