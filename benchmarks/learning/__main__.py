"""``python -m benchmarks.learning``: train the patterns that have no result yet, as long as the budget lasts."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.environment import commit, gpu_versions, versions
from benchmarks.learning.data import read_text
from benchmarks.learning.model import Shape
from benchmarks.learning.patterns import ARMS
from benchmarks.learning.train import Settings, run

SMALL = Settings(
    Shape(layers=2, dim=32, heads=8, context=512),
    steps=6,
    held_out=4,
    check_every=3,
    checked=2,
    warmup=2,
    matrix_lr=0.02,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.partition(": ")[2])
    parser.add_argument("--arms", default=",".join(ARMS), help="names of patterns, by commas; all by default")
    parser.add_argument("--seeds", default="0", help="by commas")
    parser.add_argument(
        "--data", type=Path, action="append", help="a folder of text; by default Python's installed packages"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results: what it holds is not run again")
    parser.add_argument("--minutes", type=float, help="start no run that would end later; by default there is no limit")
    parser.add_argument("--label", default="", help="added to the results' names: another comparison")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--shift-keys", action="store_true")
    parser.add_argument("--no-far-positions", action="store_true")
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--adamw", action="store_true", help="AdamW for matrices too, in place of Muon")
    options = parser.parse_args()
    arms, seeds = options.arms.split(","), [int(seed) for seed in options.seeds.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms names {unknown}: expected some of {list(ARMS)}")
    settings = SMALL if options.small else Settings()
    changes = {name: value for name in ("steps", "batch") if (value := getattr(options, name)) is not None}
    shape = replace(
        settings.shape,
        context=options.context or settings.shape.context,
        shift_keys=options.shift_keys,
        far_positions=not options.no_far_positions,
        sinks=options.sinks,
    )
    settings = replace(settings, shape=shape, **changes)
    if options.adamw:
        settings = replace(settings, matrix_lr=None)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    text = read_text(options.data or [Path(sysconfig.get_paths()["purelib"])])
    print(", ".join(f"{name} {value:,}" for name, value in text.facts.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    begun, longest = time.monotonic(), 0.0
    for seed in seeds:
        for arm in arms:
            name = "-".join(part for part in (re.sub(r"[^A-Za-z0-9.]+", "_", arm), options.label, str(seed)) if part)
            path = options.out / f"{name}.json"
            if path.exists():
                continue
            used = (time.monotonic() - begun) / 60
            if options.minutes is not None and used + longest > options.minutes:
                print(f"{arm}, seed {seed}: not begun, {options.minutes - used:.1f} minutes are left", flush=True)
                sys.exit(0)
            start = time.monotonic()
            torch.compiler.reset()
            record = run(arm, seed, settings, text, device, lambda line: print(line, flush=True))
            record |= {
                "data": text.facts,
                "environment": _environment(device),
                "minutes": (time.monotonic() - start) / 60,
            }
            part = path.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(part, path)
            longest = max(longest, (time.monotonic() - start) / 60)
            print(
                f"{arm}, seed {seed}: {record['bits']:.4f} bits, cost {record['cost']:.3f}, written to {path}",
                flush=True,
            )


def _environment(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "commit": commit(), **versions(), **gpu_versions()}


if __name__ == "__main__":
    main()
