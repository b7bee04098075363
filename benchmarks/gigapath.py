"""Prov-GigaPath's slide encoder (12 layers, 768 channels): time and memory, on a GPU beside the original, on a CPU by itself.

    python -m benchmarks.gigapath --out gigapath.json                       # a CPU, where there is no GPU
    python -m benchmarks.gigapath --out gigapath.json --gigapath PATH       # one GPU, beside a checkout of prov-gigapath

Weights are random and the same on both sides; results are compared before anything is timed. On a GPU the encoder is measured
as it comes and compiled (``compiled=True, cuda_graphs=True, recompute="elementwise"``, which is held against the limits);
compiling comes before timing, its seconds are noted. A round is several calls one after the other, as in a loop over slides.
Memory is the most that tensors took, and for the compiled encoder, whose graphs hold memory that no tensor has, the most that
torch had reserved. The file is written after every part, and a part that fails leaves its error there and the others alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.gigapath_peer import load_upstream
from benchmarks.memory import reset_peak, resident
from longnet.gigapath import SlideEncoder, passes

ARCH = "gigapath_slide_enc12l768d"
TILES = (10_000, 45_680)
# Ours over theirs. Theirs was measured as 38 / 103 ms and 8.0 GiB, 160 / 457 ms and 35.3 GiB.
LIMITS = {"forward": 1 / 3, "step": 1 / 3, "step_bytes": 1 / 3}
# Between two results of 12 layers that are both rounded to float16 at every step.
ALLOWED = 2e-2
CPU_SECONDS, CPU_BYTES = 60.0, 4e9
ROUNDS = {"forward": 9, "step": 7}
CALLS = 4
WARM_SECONDS = 2.0

Part = Callable[[], Any]


def make(device: torch.device, layers: int = 12) -> SlideEncoder:
    torch.manual_seed(0)
    return SlideEncoder(768, layers, device=device).eval()


def slide(tiles: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random tile embeddings on as many different cells, in the order in which a slide is cut."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.empty(1, tiles, 1536, device=device, dtype=dtype).normal_(generator=generator)
    cell = torch.randperm(1_000_000, generator=generator, device=device)[:tiles].sort().values
    return x, torch.stack((cell // 1000, cell % 1000), dim=-1)[None].float() * 256


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)


def forward(model: nn.Module, x: Tensor, coords: Tensor) -> Tensor:
    with torch.no_grad(), half(x.device):
        out: Tensor = model(x, coords)[0]
    return out


def step(model: nn.Module, x: Tensor, coords: Tensor) -> None:
    """Forward and backward in training mode, dropout as in the original's defaults; no optimizer."""
    model.zero_grad(set_to_none=True)
    with half(x.device):
        out = model(x, coords)[0]
    (out.float().square().mean() * 1024.0).backward()


def measure(function: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Milliseconds of a call, on the device's clock and after calls that count for nothing, and the most memory."""
    # Host and device settle after compiling.
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < WARM_SECONDS:
        function()
        torch.cuda.synchronize()
        calls += 1
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / CALLS)
    return {
        "milliseconds": times, "median": median(times), "bytes": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip


def on_gpu(tiles: int, gigapath: Path | None, torchscale: Path | None) -> dict[str, Any]:
    device = torch.device("cuda")
    ours = make(device)
    models: dict[str, nn.Module] = {"longnet": ours, "longnet compiled": ours}
    found: dict[str, Any] = {
        "tiles": tiles,
        "dtype": "float16 autocast",
        "limits": LIMITS,
        "judged": "longnet compiled",
    }
    x, coords = slide(tiles, device)
    if gigapath is None:
        found["why_not"] = "no checkout given: --gigapath PATH"
    else:
        models["gigapath"], found["remarks"] = load_upstream(gigapath, torchscale, ours, device)
    results = {}
    for name, model in models.items():
        choose(ours, name)
        start = time.perf_counter()
        results[name] = forward(model.eval(), x, coords).double()
        step(model.train(), x, coords)
        torch.cuda.synchronize()
        found[name] = {"first_seconds": time.perf_counter() - start}
        model.zero_grad(set_to_none=True)
    last = list(results.values())[-1]
    found["errors"] = {name: float((out - last).norm() / last.norm()) for name, out in results.items()}
    if not max(found["errors"].values()) <= ALLOWED:
        raise RuntimeError(f"results differ by {found['errors']}, allowed {ALLOWED}")
    for name, model in models.items():
        # Alone on the device, so that the peak is its own.
        for other in models.values():
            other.to("cpu")
        model.to(device)
        choose(ours, name)
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(forward, model, x, coords),
            "step": partial(step, model, x, coords),
        }
        for what, call in calls.items():
            # What graphs held before is not this one's.
            passes.REPLAYS.forget(ours)
            release()
            model.train(what == "step")
            found[name][what] = measure(call, ROUNDS[what])
        model.zero_grad(set_to_none=True)
    passes.REPLAYS.forget(ours)
    if "gigapath" in models:
        found["ratios"] = {name: ratios(found[name], found["gigapath"], MEMORY[name]) for name in MEMORY}
        found["reached"] = {name: found["ratios"][found["judged"]][name] <= limit for name, limit in LIMITS.items()}
    return found


def choose(model: SlideEncoder, name: str) -> None:
    """As the encoder comes, or compiled."""
    model.compiled = model.cuda_graphs = name == "longnet compiled"
    model.recompute = "elementwise" if model.compiled else "ffn"


def ratios(one: dict[str, Any], other: dict[str, Any], memory: str = "bytes") -> dict[str, float]:
    return {
        "forward": one["forward"]["median"] / other["forward"]["median"],
        "step": one["step"]["median"] / other["step"]["median"],
        "step_bytes": one["step"][memory] / other["step"]["bytes"],
    }


def largest_slide(side: int = 1000) -> dict[str, Any]:
    """A whole grid of tiles, forward."""
    device = torch.device("cuda")
    model = make(device)
    x, coords = slide(side * side, device, torch.float16)
    out = forward(model, x, coords)
    if not bool(out.isfinite().all()):
        raise RuntimeError("the largest slide's embedding is not finite")
    return {
        "tiles": side * side,
        "dtype": "float16 autocast",
        "forward": measure(partial(forward, model, x, coords), 2),
    }


def on_cpu(kind: str, tiles: int = TILES[0]) -> dict[str, Any]:
    device = torch.device("cpu")
    model = make(device)
    x, coords = slide(tiles, device)
    reset_peak()
    with torch.no_grad(), half(device) if kind == "bfloat16" else nullcontext():
        start = time.perf_counter()
        out = model(x, coords)[0]
        seconds = time.perf_counter() - start
    if not bool(out.isfinite().all()):
        raise RuntimeError(f"the embedding in {kind} is not finite")
    peak = resident("VmHWM")
    return {
        "tiles": tiles, "dtype": f"{kind}{' autocast' if kind == 'bfloat16' else ''}", "seconds": seconds,
        "resident_peak_bytes": peak, "limits": {"seconds": CPU_SECONDS, "resident_peak_bytes": CPU_BYTES},
        "reached": seconds < CPU_SECONDS and peak < CPU_BYTES,
    }  # fmt: skip


# Graphs hold memory that no tensor has.
MEMORY = {"longnet": "bytes", "longnet compiled": "reserved"}
MODES = {"longnet": "as it comes", "longnet compiled": "compiled"}


def table(result: dict[str, Any]) -> str:
    """What was measured on a GPU, as a Markdown table: the encoder as it comes and compiled, beside the original."""
    head = "| tiles | what | the encoder | here | original | ratio | limit | verdict |\n| --- " + "| --- " * 7 + "|"
    rows: list[tuple[str, ...]] = []
    for found in result["parts"].values():
        if "ratios" not in found:
            forward = found["forward"]
            rows.append(
                (
                    f"{found['tiles']:,}", "forward ms", "as it comes", f"{forward['median']:,.0f}", "-", "-", "-",
                    f"{forward['bytes'] / 2**30:.1f} GiB",
                )
            )  # fmt: skip
            continue
        for what, unit, scale in (("forward", "ms", 1.0), ("step", "ms", 1.0), ("step_bytes", "GiB", 2**30)):
            for name, mode in MODES.items():
                part, _, field = what.partition("_")
                one, other = (found[x][part][field or "median"] / scale for x in (name, "gigapath"))
                # Results from before there were graphs have the memory of tensors alone.
                if field:
                    one = found[name][part].get(MEMORY[name], found[name][part]["bytes"]) / scale
                ratio, limit = found["ratios"][name][what], found["limits"][what]
                title = {"forward": "forward", "step": "training step", "step_bytes": "training memory"}[what]
                verdict = ("reached" if ratio <= limit else "missed") if name == found["judged"] else ""
                cells = (f"{found['tiles']:,}", f"{title} {unit}", mode, f"{one:.1f}", f"{other:.1f}", f"{ratio:.3f}")
                rows.append((*cells, f"{limit:.3f}", verdict))
    return "\n".join((head, *(f"| {' | '.join(row)} |" for row in rows)))


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(out: Path, parts: dict[str, Part]) -> dict[str, Any]:
    on_cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "kind": "gigapath", "arch": ARCH, "commit": environment.commit(os.environ.get("LONGNET_COMMIT")),
        "versions": environment.versions() | (environment.gpu_versions() if on_cuda else {}),
        "device": torch.cuda.get_device_name() if on_cuda else environment.device(), "parts": {}, "errors": {},
    }  # fmt: skip
    for name, part in parts.items():
        release()
        start = time.perf_counter()
        try:
            result["parts"][name] = part()
        except Exception as error:
            traceback.print_exc()
            result["errors"][name] = f"{type(error).__name__}: {error}"
        print(
            f"{name}: {time.perf_counter() - start:.0f} s; {json.dumps(summary(result['parts'].get(name)))}", flush=True
        )
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(found: Any) -> Any:
    """The numbers without the single rounds."""
    if isinstance(found, dict):
        return {name: summary(value) for name, value in found.items() if name != "milliseconds"}
    return found


def parts(gigapath: Path | None, torchscale: Path | None) -> dict[str, Part]:
    if not torch.cuda.is_available():
        return {f"cpu {kind}": partial(on_cpu, kind) for kind in ("float32", "bfloat16")}
    found: dict[str, Part] = {f"{tiles} tiles": partial(on_gpu, tiles, gigapath, torchscale) for tiles in TILES}
    return {**found, "largest slide": largest_slide}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gigapath", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the result is written as JSON")
    parser.add_argument("--gigapath", type=Path, help="a checkout of prov-gigapath to compare with")
    parser.add_argument("--torchscale", type=Path, help="torchscale to use instead of the one in prov-gigapath")
    parser.add_argument("--part", action="append", help="only this part, as its line of output begins; may be repeated")
    options = parser.parse_args()
    found = parts(options.gigapath, options.torchscale)
    if unknown := set(options.part or ()) - set(found):
        parser.error(f"--part {', '.join(sorted(unknown))}: expected one of {', '.join(found)}")
    result = run(options.out, {name: part for name, part in found.items() if name in (options.part or found)})
    if any("ratios" in part for part in result["parts"].values()):
        print(table(result))
    raise SystemExit(1 if result["errors"] else 0)


if __name__ == "__main__":
    main()
