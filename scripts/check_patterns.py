"""Compare many random calls with the definition in float64: ``python scripts/check_patterns.py --cases 100000``.

Windows, strides, blocks, offset grids and LongNet's branches together, with lengths from 1 to 300, grouped heads, padding,
offsets for each row, documents, a relative bias, gradients of out and lse. The tests have a sample of the same.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checks import oracle
from longnet.attention.functional import pattern_attention
from longnet.geometry import HEAD_OFFSETS, Pattern

ALLOWED = 1e-10
dense_attention: Any = oracle().dense_attention


def draw(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the pattern is made of, what else the call is asked for and its sizes)."""
    lengths = [rng.choice([None, rng.randint(1, 120)]) for _ in range(rng.randint(0, 3))]
    pattern = {
        "segment_lengths": tuple(lengths),
        "dilation_rates": tuple(rng.randint(1, min(length or 9, 9)) for length in lengths),
        "window": rng.choice([None, rng.randint(1, 90)]) if lengths else rng.randint(1, 90),
        "dilated_queries": rng.random() < 0.5,
        "dilation_block": rng.choice([1, 1, 2, rng.randint(1, 20)]),
        "head_offsets": rng.choice(HEAD_OFFSETS),
    }
    about = {
        "length": rng.choice([1, 2, rng.randint(1, 40), rng.randint(1, 120), rng.randint(1, 300)]),
        "batch": rng.randint(1, 3),
        "kv_heads": rng.randint(1, 3),
        "group": rng.randint(1, 3),
        "dim": rng.randint(1, 5),
        "is_causal": rng.random() < 0.6,
        "scale": rng.choice([None, 0.7, -0.3, 0.0]),
        "backend": rng.choice(["auto", "portable"]),
        "extra": rng.choice(["none", "none", "padding", "padding", "rows", "rows", "documents", "bias"]),
        "offset": rng.choice([0, rng.randint(-150, 150)]),
    }
    return pattern, about


def error_of(parts: dict[str, Any], about: dict[str, Any], rng: random.Random) -> float:
    """The largest difference in out, lse and all gradients, over 1 or the largest value."""
    extra, length, dim = about["extra"], about["length"], about["dim"]
    heads, batch = about["kv_heads"] * about["group"], 1 if extra == "documents" else about["batch"]
    torch.manual_seed(rng.getrandbits(32))
    shapes = [(batch, count, length, dim) for count in (heads, about["kv_heads"], about["kv_heads"], heads)]
    query, key, value, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = [query, key, value]
    grad_lse = torch.randn(batch, heads, length, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    options: dict[str, Any] = {"is_causal": about["is_causal"], "scale": about["scale"]}
    offset: Any = about["offset"]
    mask = torch.rand(batch, length) < 0.3 if extra in ("padding", "rows") else None
    if extra == "rows":
        offset = torch.randint(-150, 150, (batch,))
    more: dict[str, Any] = {}
    if extra == "documents":
        bounds = [0, *sorted(rng.randint(0, length) for _ in range(rng.randint(0, 4))), length]
        offset = torch.randint(-150, 150, (len(bounds) - 1,))
        more["cu_seqlens"] = bounds
        cut = [
            dense_attention(*(x[:, :, i:j] for x in leaves), **parts, **options, segment_offset=int(own))
            for own, (i, j) in zip(offset, pairwise(bounds), strict=True)
        ]
        want = tuple(torch.cat(part, 2) for part in zip(*cut, strict=True))
    else:
        table = None
        if extra == "bias":
            more["distance_bias"] = torch.randn(heads, 2 * length + 1, dtype=torch.float64).requires_grad_()
            leaves.append(more["distance_bias"])
            place = torch.arange(length)
            table = more["distance_bias"][:, place - place[:, None] + length]
        want = dense_attention(
            *inputs, **parts, **options, segment_offset=offset, key_padding_mask=mask, score_bias=table
        )
    got: Any = pattern_attention(
        query, key, value, Pattern.compose(**parts), **options, **more, segment_offset=offset, key_padding_mask=mask,
        return_lse=True, backend=about["backend"] if extra != "bias" else "auto",
    )  # fmt: skip
    if not torch.equal(got[1] == -torch.inf, want[1] == -torch.inf):
        return float("inf")

    def everything(out: Tensor, lse: Tensor) -> list[Tensor]:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        return [out, finite, *torch.autograd.grad((out * grad).sum() + (finite * grad_lse).sum(), leaves)]

    pairs = ((a.detach(), b.detach()) for a, b in zip(everything(*got), everything(*want), strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*to no head", UserWarning)
    worst, failed = 0.0, 0
    for case in track(range(options.cases), "comparing"):
        rng = random.Random(f"{options.seed}/{case}")
        parts, about = draw(rng)
        error = error_of(parts, about, rng)
        worst = max(worst, error)
        # Written so that NaN fails too.
        if not error <= ALLOWED:
            failed += 1
            print(f"case {case}: {error:.3g} with {parts} {about}")
    print(f"{options.cases:,} cases, {failed} above {ALLOWED:g}, largest difference {worst:.3g}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
