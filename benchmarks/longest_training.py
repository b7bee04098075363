"""The longest sequence on which the paper's base model trains, on one GPU or over several.

    python -m benchmarks.longest_training --ranks 1 --out longest-1.json
    python -m benchmarks.longest_training --ranks 2 --out longest-2.json

The model is ``LongNetConfig()`` (12 layers, 768 wide) with recomputed blocks, a feed-forward in chunks,
FSDP2 in bfloat16 with float32 weights, AdamW. A length counts when two whole steps (forward, backward, optimizer) ended. Memory
grows linearly with the length, so two short runs say where to try; every try is a run of its own, as a rank whose memory ends
takes the others with it. ``--compile`` compiles the blocks, as ``longnet train`` does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks import report, results
from longnet import LongNetConfig, LongNetLM
from longnet.distributed import parallelize, shard_sequence
from longnet.training.ranks import whole

# Tokens on one device at least; tokens and seconds between tries, at least.
LIMIT, STEP, _TRY_SECONDS = 1 << 20, 1 << 16, 150.0


@dataclass(frozen=True)
class Try:
    """One length: whether two steps ended, the second one's seconds and the largest memory of any rank."""

    tokens: int
    fits: bool
    seconds: float | None = None
    gib: float | None = None
    losses: tuple[float, ...] = ()


def config(small: bool) -> LongNetConfig:
    if small:
        return LongNetConfig.preset("nano", gradient_checkpointing=True, feed_forward_chunk=256)
    return LongNetConfig(gradient_checkpointing=True, feed_forward_chunk=1 << 15)


def train(tokens: int, out: Path, compiled: bool) -> None:
    """Two steps on ``tokens`` random bytes over all ranks; the first rank writes a :class:`Try`."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = LongNetLM(config(not on_gpu), device=device)
    parallelize(model, mesh, mp_policy=policy)
    for block in model.blocks if compiled else ():
        # Not the call: a block's weights are gathered around its forward.
        block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    text = torch.randint(256, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    own, goal = (shard_sequence(x, mesh, multiple_of=1 << 12).to(device) for x in (text[:, :-1], text[:, 1:]))
    losses = []
    begun = time.perf_counter()
    for _ in range(2):
        begun = time.perf_counter()
        loss = model.loss(own, goal)
        loss.backward()
        norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        said = loss.detach().double()
        dist.all_reduce(said)
        losses.append(float(said) / dist.get_world_size())
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient norm is {norm}")
    most = torch.tensor([float(torch.cuda.max_memory_reserved(device) if on_gpu else 0)], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        best = Try(tokens, True, time.perf_counter() - begun, float(most) / 2**30, tuple(losses))
        out.write_text(json.dumps(asdict(best)))
    dist.destroy_process_group()


def attempt(tokens: int, ranks: int, seconds: float, compiled: bool) -> Try:
    """``train`` in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "try.json"
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m benchmarks.longest_training"
        command = [sys.executable, *launch.split(), "--tokens", str(tokens), "--out", str(out)]
        command += ["--compile"] * compiled
        environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "4", **os.environ}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds, check=False)
        if out.is_file():
            return Try(**json.loads(out.read_text()))
        if "OutOfMemoryError" not in ended.stderr:
            raise RuntimeError(f"{tokens:,} tokens on {ranks} ranks failed:\n{ended.stderr[-4000:]}")
        return Try(tokens, False)


def search(ranks: int, memory_gib: float, start: int, step: int, seconds: float, compiled: bool) -> Iterator[Try]:
    """Every length that is tried."""
    stop_at = time.monotonic() + seconds
    sizes = []
    for tokens in (start, 2 * start):
        one = attempt(tokens, ranks, max(_TRY_SECONDS, stop_at - time.monotonic()), compiled)
        yield one
        if not one.fits:
            return
        sizes.append(one.gib or 0.0)
    # The line through both, to where the memory ends.
    slope = max((sizes[1] - sizes[0]) / start, 1e-12)
    tokens = int(start * 2 + (memory_gib - sizes[1]) / slope) // step * step
    while tokens > start * 2 and time.monotonic() < stop_at:
        one = attempt(tokens, ranks, max(_TRY_SECONDS, stop_at - time.monotonic()), compiled)
        yield one
        if one.fits:
            return
        tokens = max(start * 2, tokens - max(step, tokens // 32 // step * step))


def main() -> None:
    parser = results.program("longest_training", __doc__, out_required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=200.0, help="after which no further length is tried")
    parser.add_argument("--start", type=int, default=LIMIT // 2, help="tokens a rank to begin with")
    parser.add_argument("--only", type=int, help="this many tokens, and no search")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="compile the blocks")
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens is not None:
        try:
            train(options.tokens, options.out, options.compiled)
        except torch.OutOfMemoryError:
            print("OutOfMemoryError", file=sys.stderr, flush=True)
            # At once: the other ranks wait in a collective that this one will never enter.
            os._exit(1)
        return
    on_gpu, ranks = torch.cuda.is_available(), options.ranks
    # The context and NCCL take memory that is not the allocator's.
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 - 2.0 if on_gpu else 0.0
    result = results.started(
        kind="longest training", device=torch.cuda.get_device_name(0) if on_gpu else "cpu", ranks=ranks,
        model=config(not on_gpu).to_dict(), limit=LIMIT if ranks == 1 and on_gpu else None,
        compiled=options.compiled, tried=[], longest=None,
    )  # fmt: skip
    tries = search(ranks, memory_gib, options.start * ranks, STEP, options.seconds, options.compiled)
    for one in tries if options.only is None else [attempt(options.only, ranks, _TRY_SECONDS, options.compiled)]:
        print(f"{ranks} rank(s), {one.tokens:,} tokens: {one}", flush=True)
        result["tried"].append(asdict(one))
        if one.fits and one.tokens > (result["longest"] or {"tokens": 0})["tokens"]:
            result["longest"] = asdict(one)
        results.save(result, options.out)
    print(report.plain(result))
    if result["longest"] is None:
        print(f"not even {options.start:,} tokens a rank fit on {result['device']}")


if __name__ == "__main__":
    main()
