"""Compare the speed of two checkouts, interleaved: both processes live side by side and are timed in turn.

    git worktree add /path/before COMMIT
    python scripts/compare.py /path/before/src src --seconds 120 --out compare.json

A case is made once by each side. Every round times all cases, the side that goes first changing. The ratio of a case is the
median over rounds of after / before, with an interval of 95 % by resampling rounds. Random data, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

Run = Callable[[], object]

# The paper's pattern.
_LENGTHS, _RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)


def attention(device: str, tokens: int, heads: int, head_dim: int, backward: bool) -> Run:
    """A causal call over one sequence."""
    import torch

    from longnet import dilated_attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, grad = (torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def run() -> None:
        out = dilated_attention(q, k, v, _LENGTHS, _RATES, is_causal=True)
        if backward:
            torch.autograd.grad(out, inputs, grad)

    return run


def stream_step(device: str) -> Run:
    """One token of a stream that has read 33,000."""
    import torch

    from longnet import DilatedCache, stream_attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cache = DilatedCache(_LENGTHS, _RATES, batch_size=1, heads=12, head_dim=64, dtype=dtype, device=device)
    read, token = (torch.randn(1, 12, tokens, 64, device=device, dtype=dtype) for tokens in (33_000, 1))
    stream_attention(read, read, read, cache)
    return partial(stream_attention, token, token, token, cache)


def slide_encoder(device: str, tiles: int, step: bool) -> Run:
    """Prov-GigaPath's encoder, compiled on a GPU; a training step or a forward pass."""
    import torch

    from longnet.gigapath import SlideEncoder

    gpu = device == "cuda"
    model = SlideEncoder(compiled=gpu, device=device).train(step)
    x = torch.randn(1, tiles, model.in_dim, device=device, dtype=torch.float16 if gpu else torch.float32)
    place = torch.arange(tiles, device=device)
    coords = 256.0 * torch.stack((place % 300, place // 300), -1)[None]

    def run() -> None:
        with torch.autocast(device, dtype=torch.float16, enabled=gpu), torch.set_grad_enabled(step):
            out = model(x, coords)[0]
        if step:
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    return run


# By name: how to make it, and calls in a row that are timed as one.
CASES: dict[str, tuple[Callable[[str], Run], int]] = {
    "forward 131,072 D=64": (lambda device: attention(device, 131_072, 12, 64, False), 10),
    "forward 131,072 D=128": (lambda device: attention(device, 131_072, 6, 128, False), 10),
    "forward+backward 131,072 D=64": (lambda device: attention(device, 131_072, 12, 64, True), 4),
    "forward+backward 131,072 D=128": (lambda device: attention(device, 131_072, 6, 128, True), 4),
    "forward 8,192": (lambda device: attention(device, 8192, 12, 64, False), 100),
    "forward+backward 8,192": (lambda device: attention(device, 8192, 12, 64, True), 40),
    "stream step": (stream_step, 100),
    "slide encoder 45,680 forward": (lambda device: slide_encoder(device, 45_680, False), 4),
    "slide encoder 45,680 step": (lambda device: slide_encoder(device, 45_680, True), 2),
}


def serve() -> None:
    """One side: makes a case when it is first named, times it afterwards. One line of JSON in, one out."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    made: dict[str, Run] = {}
    for line in sys.stdin:
        name = json.loads(line)
        make, calls = CASES[name]
        calls, first = calls if device == "cuda" else 1, name not in made
        if first:
            torch.manual_seed(0)
            made[name] = make(device)
        wait()
        begun = time.perf_counter()
        for _ in range(5 if first and device == "cuda" else calls):
            made[name]()
        sent = time.perf_counter()
        wait()
        done = time.perf_counter()
        print(json.dumps({"ms": (done - begun) / calls * 1e3, "host_ms": (sent - begun) / calls * 1e3}), flush=True)


class Side:
    """A process that imports one checkout's sources."""

    def __init__(self, sources: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(sources.resolve())}
        command = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Raises RuntimeError if the process has ended."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"a side ended with status {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def summary(rounds: list[tuple[dict[str, float], dict[str, float]]], key: str) -> dict[str, Any]:
    """Medians of both sides, the median ratio after / before, and its interval."""
    ratios = [after[key] / before[key] for before, after in rounds]
    draw = random.Random(0)
    drawn = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    before, after = (median(one[side][key] for one in rounds) for side in (0, 1))
    return {"before": before, "after": after, "ratio": median(ratios), "interval": [drawn[50], drawn[-51]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="two folders to import longnet from: before, after")
    parser.add_argument("--seconds", type=float, default=120, help="of timing, after everything is made")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if len(options.sources) != 2:
        parser.error(f"{len(options.sources)} folders of sources given: expected two, before and after")
    sides = [Side(sources) for sources in options.sources]
    for name in options.cases:
        for side in sides:
            side.ask(name)
        for side in sides:
            side.answer()
        print(f"made: {name}", flush=True)
    rounds: dict[str, list[Any]] = {name: [] for name in options.cases}
    end, turn = time.monotonic() + options.seconds, 0
    while time.monotonic() < end or turn < 2:
        for name in options.cases:
            answers = {}
            for which in (turn % 2, 1 - turn % 2):
                sides[which].ask(name)
                answers[which] = sides[which].answer()
            rounds[name].append((answers[0], answers[1]))
        turn += 1
    result = {name: {key: summary(each, key) for key in ("ms", "host_ms")} for name, each in rounds.items()}
    for name, found in result.items():
        one = found["ms"]
        low, high = one["interval"]
        print(
            f"{name}: {one['before']:.3f} -> {one['after']:.3f} ms, ratio {one['ratio']:.4f} ({low:.4f} to {high:.4f})"
        )
    if options.out is not None:
        options.out.write_text(json.dumps({"result": result, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
