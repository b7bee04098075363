"""The command line: ``cpu`` and ``gpu`` measure, ``show`` prints, ``merge`` joins, ``tables`` writes the documents.

argparse, so that a GPU machine needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import environment, present, terminal
from benchmarks.cases import FULL, QUICK, Sizes
from benchmarks.checks import CheckFailed
from benchmarks.documents import BadMarker, documents, rewrite
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu.machine import Cuda, Machine, why_no_cuda
from benchmarks.gpu.runner import Checkouts, GpuBenchmark
from benchmarks.plot import plot
from benchmarks.runner import SECTIONS, Benchmark
from benchmarks.verdicts import Result

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"


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
    except (Refused, present.NoResult, BadMarker) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"check failed, no number is given: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        "python -m benchmarks",
        description="What longnet costs: time, memory, growth, each checked first and judged by its limit.",
    )
    commands = found.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=run)
        return one

    one = add("cpu", cpu, "Measure on this CPU: prints tables, writes JSON and a picture.")
    one.add_argument("--section", action="append", choices=SECTIONS, help="only this part; may be repeated")
    one.add_argument("--length", action="append", type=int, help="only this N for speed and memory; may be repeated")
    one.add_argument("--dtype", action="append", choices=FULL.dtypes, help="only this dtype; may be repeated")
    _add_common(one)
    one = add("gpu", gpu, "Measure on this CUDA device: prints tables, writes JSON after every step, and a picture.")
    one.add_argument("--section", action="append", choices=gpu_cases.SECTIONS, help="only this part; may be repeated")
    one.add_argument("--length", action="append", type=int, help="only this N for speed; may be repeated")
    one.add_argument("--head-dim", action="append", type=int, help="only this D for speed; may be repeated")
    one.add_argument("--dilated-attention-pytorch", type=Path, help="a checkout of fkodom's, timed beside")
    one.add_argument("--alexisrozhkov", type=Path, help="a checkout of dilated-self-attention, timed beside")
    one.add_argument("--commit", help="the commit of these sources, where git cannot say")
    _add_common(one)
    one = add("show", show, "Print the tables of a result again.")
    one.add_argument("file", type=Path, help="JSON of an earlier run")
    one.add_argument("--markdown", action="store_true", help="as markdown")
    one.add_argument("--plot", type=Path, help="also draw time against length into this PNG")
    one = add("merge", merge, "Join parts of a GPU run: of one commit, one kind of device, no cell twice.")
    one.add_argument(
        "files",
        nargs="+",
        type=Path,
        help="JSON of the parts, or of a run in a copy of this checkout, which then gets its commit",
    )
    one.add_argument("--out", required=True, type=Path, help="JSON to write, its picture beside it")
    one = add("tables", tables, "Write the marked tables of README.md and docs from the results that they name.")
    one.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    return found


def _add_common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="sizes of seconds, which judge nothing")
    one.add_argument("--torchscale", type=Path, help="a checkout of torchscale, timed beside")
    one.add_argument("--out", type=Path, help="JSON to write, its picture beside it")
    one.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw time against length")


def cpu(options: argparse.Namespace) -> int:
    sizes = _sizes(QUICK if options.quick else FULL, options.length, options.dtype)
    sections = tuple(options.section or SECTIONS)
    whole = sizes == FULL and set(sections) == set(SECTIONS)
    benchmark = Benchmark(sizes, sections, options.torchscale)
    terminal.run(benchmark.steps())
    kind = "quick" if options.quick else "cpu" if whole else "partial"
    path = options.out or _RESULTS / f"{kind}-{benchmark.result['date'][:10]}.json"
    present.save(benchmark.result, path)
    _finish(path, options.plot)
    return 0


def gpu(options: argparse.Namespace, machine: Machine | None = None) -> int:
    if machine is None:
        reason = why_no_cuda()
        if reason is not None:
            raise Refused(f"the GPU benchmark needs a CUDA device: {reason}. On this machine: python -m benchmarks cpu")
        machine = Cuda()
    sizes = gpu_cases.QUICK if options.quick else gpu_cases.FULL
    checkouts = Checkouts(options.torchscale, options.dilated_attention_pytorch, options.alexisrozhkov)
    sections = tuple(options.section or gpu_cases.SECTIONS)
    try:
        sizes = gpu_cases.only(sizes, options.length, options.head_dim)
        benchmark = GpuBenchmark(machine, sizes, sections, checkouts, options.commit)
    except ValueError as error:
        raise Refused(str(error)) from None
    whole = sizes == gpu_cases.FULL and set(sections) == set(gpu_cases.SECTIONS)
    kind = "gpu-quick" if options.quick else "gpu" if whole else "gpu-partial"
    path = options.out or _RESULTS / f"{kind}-{benchmark.result['date'][:10]}.json"
    terminal.run(benchmark.steps(), after=lambda: present.save(benchmark.result, path))
    _finish(path, options.plot)
    return 0


def show(options: argparse.Namespace) -> int:
    result = present.load(options.file)
    if options.markdown:
        print(present.markdown(result))
    else:
        terminal.show(result)
    if options.plot is not None:
        _plot(result, options.plot)
    return 0


def merge(options: argparse.Namespace) -> int:
    result = present.merge({str(path): present.load(path) for path in options.files})
    # A copy that was measured elsewhere may not know its commit; a checkout of the same sources does.
    here = environment.commit()
    if here["dirty"] is False and here["sources"] == result["commit"]["sources"]:
        result["commit"] = here
    present.save(result, options.out)
    _finish(options.out, True)
    return 0


def tables(options: argparse.Namespace) -> int:
    stale = []
    for path in documents(_ROOT):
        text = path.read_text()
        try:
            made = rewrite(text, _ROOT)
        except BadMarker as error:
            raise BadMarker(f"{path.relative_to(_ROOT)}: {error}") from None
        if made != text:
            stale.append(str(path.relative_to(_ROOT)))
            if not options.check:
                path.write_text(made)
    for name in stale:
        print(f"{'out of date' if options.check else 'written'}: {name}")
    return 1 if options.check and stale else 0


def _sizes(sizes: Sizes, lengths: list[int] | None, dtypes: list[str] | None) -> Sizes:
    if lengths:
        for length in lengths:
            if length < sizes.base.block:
                raise Refused(f"--length {length} is below {sizes.base.block}, one block of the kernel")
        sizes = replace(sizes, speed_lengths=tuple(lengths), memory_lengths=tuple(lengths))
    if dtypes:
        sizes = replace(sizes, dtypes=tuple(dtypes))
    return sizes


def _finish(path: Path, draw: bool) -> None:
    # From the file: what is printed now is what `show` prints later.
    result = present.load(path)
    terminal.show(result)
    print(f"Written: {path}")
    if not draw or not (result["curves"] if "curves" in result else result["growth"]):
        return
    picture = path.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No picture: matplotlib is not installed. Later: python -m benchmarks show {path} --plot {picture}")
        return
    _plot(result, picture)
    print(f"Written: {picture}")


def _plot(result: Result, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed: pip install matplotlib")
    try:
        plot(result, path)
    except ValueError as error:
        raise Refused(str(error)) from None
