"""Prov-GigaPath's slide encoder (12 layers, 768 channels): time and memory, on a GPU beside the original, on a CPU by itself.

    python -m benchmarks.gigapath --out gigapath.json                       # a CPU, where there is no GPU
    python -m benchmarks.gigapath --out gigapath.json --gigapath PATH       # one GPU, beside a checkout of prov-gigapath

Weights are random and the same on both sides; results are compared before anything is timed. On a GPU the encoder is measured
with its defaults and compiled (``compiled=True, cuda_graphs=True, recompute="elementwise"``, which is held against the limits);
compiling comes before timing, its seconds are noted. A round is several calls one after the other, as in a loop over slides.
Memory is the most that tensors took, and for the compiled encoder, whose graphs hold memory that no tensor has, the most that
torch had reserved. The file is written after every part, and a part that fails leaves its error there and the others alone.
"""

from __future__ import annotations

import json
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

from benchmarks import checks, environment, report, results
from benchmarks.cases import Record
from benchmarks.device import Cpu, Cuda, HostClock, here
from benchmarks.peers import load_gigapath
from benchmarks.timing import host_seconds, interleave, repeated, settle
from longnet.gigapath import SlideEncoder, passes

ARCH, TILES = "gigapath_slide_enc12l768d", (10_000, 45_680)
# Ours over theirs. Theirs was measured as 38 / 103 ms and 8.0 GiB, 160 / 457 ms and 35.3 GiB.
LIMITS = {"forward": 1 / 3, "step": 1 / 3, "step_bytes": 1 / 3}
# Between two results of 12 layers that are both rounded to float16 at every step.
ALLOWED = 2e-2
CPU_LIMITS = {"seconds": 60.0, "resident_peak_bytes": 4e9}
ROUNDS, CALLS, WARM_SECONDS = {"forward": 9, "step": 7}, 4, 2.0

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


def measure(function: Callable[[], object], rounds: int) -> Record:
    """Milliseconds of a call, several one after the other, and the most memory."""
    device = Cuda()
    settle(device, function, WARM_SECONDS)
    device.reset_peak()
    seconds = interleave(HostClock(device.device), {"": repeated(function, CALLS)}, rounds, rounds)[""]
    times = [1e3 * one / CALLS for one in seconds]
    memory = {"bytes": device.peak(), "reserved": torch.cuda.max_memory_reserved()}
    return {"milliseconds": times, "median": median(times), **memory}


def on_gpu(tiles: int, gigapath: Path | None, torchscale: Path | None) -> Record:
    device = Cuda()
    ours = make(device.device)
    models: dict[str, nn.Module] = {"longnet": ours, "longnet compiled": ours}
    record: Record = {"tiles": tiles, "dtype": "float16 autocast", "limits": LIMITS, "judged": "longnet compiled"}
    x, coords = slide(tiles, device.device)
    if gigapath is None:
        record["why_not"] = "no checkout given: --gigapath PATH"
    else:
        models["gigapath"], record["remarks"] = load_gigapath(gigapath, torchscale, ours, device.device)
    outs = {}
    for name, model in models.items():
        choose(ours, name)

        def first(model: nn.Module = model, name: str = name) -> None:
            outs[name] = forward(model.eval(), x, coords)
            step(model.train(), x, coords)

        record[name] = {"first_seconds": host_seconds(device, first)}
        model.zero_grad(set_to_none=True)
    errors = {name: checks.relative_error(out, list(outs.values())[-1]) for name, out in outs.items()}
    record["errors"] = checks.require("results of the encoders", errors, ALLOWED)
    for name, model in models.items():
        # Alone on the device, so that the peak is its own.
        for other in models.values():
            other.to("cpu")
        model.to(device.device)
        choose(ours, name)
        calls: dict[str, Callable[..., object]] = {"forward": forward, "step": step}
        for what, call in calls.items():
            # The memory of earlier graphs is not this one's.
            passes.REPLAYS.forget(ours)
            device.release()
            model.train(what == "step")
            record[name][what] = measure(partial(call, model, x, coords), ROUNDS[what])
        model.zero_grad(set_to_none=True)
    passes.REPLAYS.forget(ours)
    if "gigapath" in models:
        memory = report.ENCODER_MEMORY
        record["ratios"] = {name: ratios(record[name], record["gigapath"], memory[name]) for name in memory}
        record["reached"] = {name: record["ratios"][record["judged"]][name] <= limit for name, limit in LIMITS.items()}
    return record


def choose(model: SlideEncoder, name: str) -> None:
    """With the encoder's defaults, or compiled."""
    model.compiled = model.cuda_graphs = name == "longnet compiled"
    model.recompute = "elementwise" if model.compiled else "ffn"


def ratios(one: Record, other: Record, memory: str) -> dict[str, float]:
    times = {what: one[what]["median"] / other[what]["median"] for what in ("forward", "step")}
    return times | {"step_bytes": one["step"][memory] / other["step"]["bytes"]}


def largest_slide(side: int = 1000) -> Record:
    """A whole grid of tiles, forward."""
    device = torch.device("cuda")
    model = make(device)
    x, coords = slide(side * side, device, torch.float16)
    require_finite(forward(model, x, coords))
    measured = measure(partial(forward, model, x, coords), 2)
    return {"tiles": side * side, "dtype": "float16 autocast", "forward": measured}


def on_cpu(kind: str, tiles: int = TILES[0]) -> Record:
    device = Cpu()
    model = make(device.device)
    x, coords = slide(tiles, device.device)
    device.reset_peak()
    with torch.no_grad(), half(device.device) if kind == "bfloat16" else nullcontext():
        start = device.start()
        out = model(x, coords)[0]
        record = {"seconds": device.seconds(start, device.stop())}
    record["resident_peak_bytes"] = device.peak()
    require_finite(out)
    reached = all(record[name] < limit for name, limit in CPU_LIMITS.items())
    dtype = f"{kind}{' autocast' if kind == 'bfloat16' else ''}"
    return {"tiles": tiles, "dtype": dtype, **record, "limits": CPU_LIMITS, "reached": reached}


def require_finite(out: Tensor) -> None:
    if not bool(out.isfinite().all()):
        raise checks.CheckFailed("the embedding is not finite")


def run(out: Path, parts: dict[str, Part]) -> Record:
    device = here()
    described = torch.cuda.get_device_name() if device.kind == "cuda" else device.describe()
    result = results.started(kind="gigapath", arch=ARCH, device=described, parts={}, errors={})
    result["versions"] |= environment.gpu_versions() if device.kind == "cuda" else {}
    for name, part in parts.items():
        device.release()
        start = time.perf_counter()
        try:
            result["parts"][name] = part()
        except Exception as error:
            traceback.print_exc()
            result["errors"][name] = f"{type(error).__name__}: {error}"
        numbers = json.dumps(summary(result["parts"].get(name)))
        print(f"{name}: {time.perf_counter() - start:.0f} s; {numbers}", flush=True)
        results.save(result, out)
    return result


def summary(part: Any) -> Any:
    """The numbers without the single rounds."""
    if isinstance(part, dict):
        return {name: summary(value) for name, value in part.items() if name != "milliseconds"}
    return part


def parts(gigapath: Path | None, torchscale: Path | None) -> dict[str, Part]:
    if not torch.cuda.is_available():
        return {f"cpu {kind}": partial(on_cpu, kind) for kind in ("float32", "bfloat16")}
    chosen: dict[str, Part] = {f"{tiles} tiles": partial(on_gpu, tiles, gigapath, torchscale) for tiles in TILES}
    return {**chosen, "largest slide": largest_slide}


def main() -> None:
    parser = results.program("gigapath", __doc__, out_required=True)
    parser.add_argument("--gigapath", type=Path, help="a checkout of prov-gigapath to compare with")
    parser.add_argument("--torchscale", type=Path, help="torchscale to use instead of the one in prov-gigapath")
    parser.add_argument("--part", action="append", help="only this part, as its line of output begins; may be repeated")
    options = parser.parse_args()
    chosen = parts(options.gigapath, options.torchscale)
    if unknown := set(options.part or ()) - set(chosen):
        parser.error(f"--part {', '.join(sorted(unknown))}: expected one of {', '.join(chosen)}")
    result = run(options.out, {name: part for name, part in chosen.items() if name in (options.part or chosen)})
    if any("ratios" in part for part in result["parts"].values()):
        print(report.tables(result)[0].markdown())
    raise SystemExit(1 if result["errors"] else 0)


if __name__ == "__main__":
    main()
