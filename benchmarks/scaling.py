"""One sequence over several devices against one device: time at the same tokens a device, and the result.

    torchrun --nproc-per-node 2 -m benchmarks.scaling --out scaling.json     # GPUs over NCCL, or CPUs over gloo

Every rank first computes the whole sequence by itself and compares its shard of the sharded call with it, before anything is
timed. Then rounds time in turn a call on one device alone, and the sharded call of as many tokens a device; both wait for all
ranks first, and a round counts the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import environment
from benchmarks.cases import Case
from longnet import dilated_attention

# Time of the sharded call over that of one device with as many tokens.
LIMIT = 1.05
# Error of the sharded result against one device's, both rounded to bfloat16 or float32.
ALLOWED = {"bfloat16": 8e-3, "float32": 1e-5}
ROUNDS = 9


def sizes(on_gpu: bool, ranks: int) -> Case:
    """A shard; the longest segment spans all ranks."""
    levels = 6 if on_gpu else 3
    shard = 1 << 20 if on_gpu else 1 << 12
    base = 2048 if on_gpu else 256
    lengths = [base * 4**i for i in range(levels)]
    lengths[-1] = max(lengths[-1], shard * ranks)
    kind, heads = ("bfloat16", 16) if on_gpu else ("float32", 4)
    rates = tuple(4**i for i in range(levels))
    return Case(shard, kind, heads=heads, segment_lengths=tuple(lengths), dilation_rates=rates)


def forward(case: Case, tensors: list[Tensor], group: Any = None) -> Tensor:
    query, key, value, _ = tensors
    with torch.no_grad():
        return dilated_attention(
            query, key, value, case.segment_lengths, case.dilation_rates, is_causal=case.is_causal, group=group
        )


def call(case: Case, tensors: list[Tensor], group: Any = None) -> tuple[Tensor, ...]:
    """out and the gradients of query, key and value."""
    *inputs, grad = tensors
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    out = dilated_attention(
        query, key, value, case.segment_lengths, case.dilation_rates, is_causal=case.is_causal, group=group
    )
    return (out.detach(), *torch.autograd.grad(out, (query, key, value), grad))


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def run(out: Path | None) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    case = sizes(on_gpu, ranks)
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.heads, case.length * ranks, case.head_dim)
    whole = [torch.randn(shape, generator=generator, device=device).to(case.torch_dtype) for _ in range(4)]
    mine = slice(rank * case.length, (rank + 1) * case.length)
    shard = [x[:, :, mine].clone() for x in whole]
    group = dist.group.WORLD
    errors = {}
    for name, got, want in zip(
        ("out", "grad_query", "grad_key", "grad_value"), call(case, shard, group), call(case, whole), strict=True
    ):
        want = want[:, :, mine].double()
        errors[name] = float((got.double() - want).norm() / want.norm())
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, errors)
    worst = {name: max(one[name] for one in said) for name in errors}
    if max(worst.values()) > ALLOWED[case.dtype]:
        raise RuntimeError(f"the sharded result differs from one device's: {worst}, allowed {ALLOWED[case.dtype]}")
    del whole
    timed_calls: dict[str, Callable[[], object]] = {
        "alone": lambda: call(case, shard),
        "together": lambda: call(case, shard, group),
        "alone, forward": lambda: forward(case, shard),
        "together, forward": lambda: forward(case, shard, group),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed_calls}
    for function in timed_calls.values():
        timed(function, device)
    for _ in range(ROUNDS):
        for name, function in timed_calls.items():
            seconds[name].append(timed(function, device))
    ratio = median(seconds["together"]) / median(seconds["alone"])
    result = {
        "kind": "scaling",
        "commit": environment.commit(os.environ.get("LONGNET_COMMIT")),
        "versions": environment.versions(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "ranks": ranks,
        "shard": asdict(case),
        "errors": worst,
        "seconds": seconds,
        "ratio": ratio,
        "limit": LIMIT if on_gpu else None,
    }
    if rank == 0:
        print(
            f"{ranks} x {result['device']}, {case.length:,} tokens each, forward and backward, the longest segment over all"
        )
        for name in ("", ", forward"):
            alone, together = (median(seconds[f"{one}{name}"]) * 1e3 for one in ("alone", "together"))
            print(f"one device alone{name} {alone:.2f} ms, together {together:.2f} ms")
        print(
            f"ratio {ratio:.3f}" + (f", limit {LIMIT}: {'reached' if ratio <= LIMIT else 'missed'}" if on_gpu else "")
        )
        print("largest errors against one device: " + ", ".join(f"{name} {x:.1e}" for name, x in worst.items()))
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the first rank writes the result as JSON")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start with torchrun --nproc-per-node K -m benchmarks.scaling")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(options.out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
