"""``python -m benchmarks.learning``: train the patterns that have no result yet, as long as the budget lasts."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.environment import commit, gpu_versions, versions
from benchmarks.learning import kinds
from benchmarks.learning.data import read_text
from benchmarks.learning.model import Shape
from benchmarks.learning.patterns import ARMS
from benchmarks.learning.train import Settings, run, warm_up

# Longer than the window, and with a layer in the middle quarter: patterns differ.
SMALL = Settings(Shape(layers=4, dim=32, context=1024), steps=2, held_out=2, check_every=1, checked=1, warmup=1)


@dataclass(frozen=True)
class Run:
    """One result file: what is trained, and the file's name."""

    arm: str
    seed: int
    settings: Settings
    name: str


def main() -> None:
    command, lines = _parsers()
    options = command.parse_args()
    planned = _planned(options, lines)
    missing = [one for one in planned if not _is_made(one, options.out / f"{one.name}.json", command)]
    if not missing:
        print(f"{options.out} holds all {len(planned)} results")
        return
    missing = missing[options.part[0] :: options.part[1]]
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    if options.compile_only:
        for one in missing:
            torch.compiler.reset()
            warm_up(one.arm, one.settings, device)
            print(f"{one.name}: compiled", flush=True)
        return
    text = read_text(options.data or [Path(sysconfig.get_paths()["purelib"])])
    print(", ".join(f"{name} {value:,}" for name, value in text.facts.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    begun, longest = time.monotonic(), 0.0
    for one in missing:
        used = (time.monotonic() - begun) / 60
        if options.minutes is not None and used + longest > options.minutes:
            print(f"{one.name}: not begun, {options.minutes - used:.1f} minutes are left", flush=True)
            return
        start = time.monotonic()
        torch.compiler.reset()
        record = run(one.arm, one.seed, one.settings, text, device, lambda line: print(line, flush=True))
        record |= {
            "data": text.facts,
            "environment": _environment(device),
            "minutes": (time.monotonic() - start) / 60,
        }
        path = options.out / f"{one.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, path)
        longest = max(longest, (time.monotonic() - start) / 60)
        print(
            f"{one.arm}, seed {one.seed}: {record['bits']:.4f} bits, cost {record['cost']:.3f}, written to {path}",
            flush=True,
        )


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """(of the command, of a line of a list: what says which runs there are)."""
    lines = argparse.ArgumentParser(prog="a line of --list", add_help=False)
    lines.add_argument("--arms", type=_arms, default=list(ARMS), help="names of patterns, by commas; all by default")
    lines.add_argument("--seeds", type=kinds.seeds, default=[0], help="by commas")
    lines.add_argument("--label", default="", help="added to the results' names: another comparison")
    for name in ("--steps", "--batch", "--context"):
        lines.add_argument(name, type=kinds.count)
    lines.add_argument("--shift-keys", action="store_true")
    lines.add_argument("--no-far-positions", action="store_true")
    lines.add_argument("--sinks", type=int, default=0)
    lines.add_argument("--adamw", action="store_true", help="AdamW for matrices too, in place of Muon")
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.partition(": ")[2], parents=[lines]
    )
    command.add_argument(
        "--data", type=kinds.existing, action="append", help="a folder of text; by default Python's installed packages"
    )
    command.add_argument("--out", type=Path, required=True, help="folder of results: what it holds is not run again")
    command.add_argument(
        "--minutes", type=kinds.above, help="start no run that would end later; by default there is no limit"
    )
    command.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    command.add_argument(
        "--list",
        type=kinds.existing,
        help="a file of runs; a line holds options from --arms to --adamw, the command's are its defaults",
    )
    command.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/M",
        help="of the missing runs every M-th, from number I on: for several GPUs",
    )
    command.add_argument(
        "--compile-only",
        action="store_true",
        help="train nothing: fill the compiler's cache, side by side by --part",
    )
    return command, lines


def _arms(text: str) -> list[str]:
    arms = [arm.strip() for arm in text.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise argparse.ArgumentTypeError(f"{unknown} are no patterns: expected some of {list(ARMS)}")
    return arms


def _is_made(one: Run, path: Path, command: argparse.ArgumentParser) -> bool:
    """Whether the run's result is there; an error where the file holds something else."""
    if not path.exists():
        return False
    try:
        record = json.loads(path.read_text())
        made = Settings.from_dict(record["settings"])
    except (ValueError, KeyError, TypeError, AttributeError):
        command.error(f"{path} is damaged: expected a result of this program; without the file the run is made again")
    if (record["arm"], record["seed"], made) != (one.arm, one.seed, one.settings):
        command.error(f"{path} is of other settings ({made}): expected {one.settings}, or another --label or --out")
    return True


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/M, two numbers of which the first is less")
    return int(number), int(count)


def _planned(options: argparse.Namespace, lines: argparse.ArgumentParser) -> list[Run]:
    """The runs that were asked for, each once."""
    each = [options]
    if options.list is not None:
        given = (shlex.split(line, comments=True) for line in options.list.read_text().splitlines())
        each = [lines.parse_args(line, argparse.Namespace(**vars(options))) for line in given if line]
    runs = [one for some in each for one in _runs(some, lines)]
    by_name = {one.name: one for one in runs}
    if unequal := [one.name for one in runs if one != by_name[one.name]]:
        lines.error(f"several runs have the names {unequal}: expected another --label for other options")
    return list(by_name.values())


def _runs(options: argparse.Namespace, lines: argparse.ArgumentParser) -> list[Run]:
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
    for arm in options.arms:
        bands = [band for layer in ARMS[arm](shape.layers) for band in layer.bands]
        if over := [band for band in bands if shape.context % (band.stride * band.block)]:
            every = over[0].stride * over[0].block
            lines.error(f"--context {shape.context} with {arm!r}: expected a multiple of {every}")
    return [
        Run(arm, seed, settings, "-".join(part for part in (_file_name(arm), options.label, str(seed)) if part))
        for seed in options.seeds
        for arm in options.arms
    ]


def _file_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", arm)


def _environment(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "commit": commit(), **versions(), **gpu_versions()}


if __name__ == "__main__":
    main()
