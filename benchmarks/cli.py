"""The command line: ``cpu`` and ``gpu`` measure, ``show`` prints, ``merge`` joins, ``tables`` writes the documents.

argparse, so that a GPU machine needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment, harness, report, results, terminal
from benchmarks.cases import Record
from benchmarks.checks import CheckFailed
from benchmarks.device import Cpu, Cuda, Device, no_cuda_reason
from benchmarks.documents import BadMarker, documents, rewrite
from benchmarks.environment import ROOT
from benchmarks.plot import plot


class Refused(ValueError):
    """What was asked for cannot be done: exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what it says, 1 when a check failed, 2 for what cannot be done.

    Without a command: everything on this CPU, as ``cpu`` does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments or ["cpu"])
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except (Refused, results.NoResult, BadMarker) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"check failed, no number is given: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "python -m benchmarks",
        description="What longnet costs: time, memory, growth, each checked first and judged by its limit.",
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=run)
        return one

    one = add("cpu", cpu, "Measure on this CPU: prints tables, writes JSON and a picture.")
    _only(one, "--section", "part", choices=harness.sections("cpu"))
    _only(one, "--length", "N for speed and memory", type=int)
    _only(one, "--dtype", "dtype", choices=("float32", "bfloat16"))
    _add_common(one)
    one = add("gpu", gpu, "Measure on this CUDA device: prints tables, writes JSON after every step, and a picture.")
    _only(one, "--section", "part", choices=harness.sections("cuda"))
    _only(one, "--length", "N for speed", type=int)
    _only(one, "--head-dim", "D for speed", type=int)
    one.add_argument("--dilated-attention-pytorch", type=Path, help="a checkout of fkodom's, timed beside")
    one.add_argument("--alexisrozhkov", type=Path, help="a checkout of dilated-self-attention, timed beside")
    one.add_argument("--commit", help="the commit of these sources, where git cannot say")
    _add_common(one)
    one = add("show", show, "Print the tables of a result again.")
    one.add_argument("file", type=Path, help="JSON of an earlier run")
    one.add_argument("--markdown", action="store_true", help="as markdown")
    one.add_argument("--plot", type=Path, help="also draw time against length into this PNG")
    one = add("merge", merge, "Join parts of a GPU run: of one commit, one kind of device, no cell twice.")
    text = "JSON of the parts, or of a run in a copy of this checkout, which then gets its commit"
    one.add_argument("files", nargs="+", type=Path, help=text)
    one.add_argument("--out", required=True, type=Path, help="JSON to write, its picture beside it")
    one = add("tables", tables, "Write the marked tables of README.md and docs from the results that they name.")
    one.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    return root


def _only(one: argparse.ArgumentParser, flag: str, what: str, **options: Any) -> None:
    one.add_argument(flag, action="append", help=f"only this {what}; may be repeated", **options)


def _add_common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="sizes of seconds, which judge nothing")
    one.add_argument("--torchscale", type=Path, help="a checkout of torchscale, timed beside")
    one.add_argument("--out", type=Path, help="JSON to write, its picture beside it")
    one.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw time against length")


def cpu(options: argparse.Namespace) -> int:
    return _measure(Cpu(), options, ("torchscale",))


def gpu(options: argparse.Namespace, device: Device | None = None) -> int:
    if device is None:
        reason = no_cuda_reason()
        if reason is not None:
            raise Refused(f"the GPU benchmark needs a CUDA device: {reason}. On this machine: python -m benchmarks cpu")
        device = Cuda()
    return _measure(device, options, ("torchscale", "dilated_attention_pytorch", "alexisrozhkov"))


def _measure(device: Device, options: argparse.Namespace, others: tuple[str, ...]) -> int:
    on_gpu, scale = device.kind == "cuda", f"{device.kind}-quick" if options.quick else device.kind
    try:
        cells = harness.cells(scale, options.section)
        if on_gpu:
            cells = harness.only(cells, scale, options.length, options.head_dim)
        else:
            cells = harness.of_dtypes(harness.at_lengths(cells, options.length), options.dtype)
        run = harness.new_run(device, scale, cells, getattr(options, "commit", None))
    except ValueError as error:
        raise Refused(str(error)) from None
    names = ("gpu-quick", "gpu", "gpu-partial") if on_gpu else ("quick", "cpu", "partial")
    name = names[0] if options.quick else names[1] if cells == harness.cells(scale) else names[2]
    path = options.out or ROOT / "benchmarks" / "results" / f"{name}-{run.result['date'][:10]}.json"
    save = partial(results.save, run.result, path)
    # Hours on a machine that may be taken away: a GPU's result is complete enough to be written after every step.
    try:
        terminal.run(harness.steps(run, **{name: getattr(options, name) for name in others}), save if on_gpu else None)
    except Exception as error:
        # What fails on a card is what its owner has to send.
        if on_gpu:
            run.result["failed"] = f"{type(error).__name__}: {error}"
            save()
            print(f"\nWritten, with what failed: {path}", file=sys.stderr)
        raise
    save()
    _finish(path, options.plot)
    return 0


def show(options: argparse.Namespace) -> int:
    result = results.load(options.file)
    if options.markdown:
        print(report.markdown(result))
    else:
        terminal.show(result)
    if options.plot is not None:
        _plot(result, options.plot)
    return 0


def merge(options: argparse.Namespace) -> int:
    result = results.merge({str(path): results.load(path) for path in options.files})
    # A copy that was measured elsewhere may not know its commit; a checkout of the same sources does.
    here = environment.commit()
    if here["dirty"] is False and here["sources"] == result["commit"]["sources"]:
        result["commit"] = here
    results.save(result, options.out)
    _finish(options.out, True)
    return 0


def tables(options: argparse.Namespace) -> int:
    stale = []
    for path in documents(ROOT):
        text = path.read_text()
        try:
            made = rewrite(text, ROOT)
        except BadMarker as error:
            raise BadMarker(f"{path.relative_to(ROOT)}: {error}") from None
        if made != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(made)
    for name in stale:
        print(f"{'out of date' if options.check else 'written'}: {name}")
    return 1 if options.check and stale else 0


def _finish(path: Path, draw: bool) -> None:
    # From the file: what is printed now is what `show` prints later.
    result = results.load(path)
    terminal.show(result)
    print(f"Written: {path}")
    picture = path.with_suffix(".png")
    if not draw or not result.get("curves"):
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No picture: matplotlib is not installed. Later: python -m benchmarks show {path} --plot {picture}")
        return
    _plot(result, picture)
    print(f"Written: {picture}")


def _plot(result: Record, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed: pip install matplotlib")
    try:
        plot(result, path)
    except ValueError as error:
        raise Refused(str(error)) from None
