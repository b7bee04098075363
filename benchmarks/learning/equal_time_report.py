"""Results of ``benchmarks.learning.equal_time``: tables for each folder, and pictures.

    python -m benchmarks.learning.equal_time_report FOLDER [FOLDER ...] --to equal-time.png --lengths-to lengths.png

A folder holds runs of one context. The tables: runs that began with random weights; converted runs beside the run whose
weights they began with; all models at other lengths than their context, which the second picture shows by position.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.learning import kinds
from benchmarks.learning.report import difference
from benchmarks.report import Table
from longnet.figures.style import COLORS, new_figure, quiet, save

Record = dict[str, Any]
Groups = dict[str, list[Record]]
BASELINE = "balanced"


def load(folder: Path) -> Groups:
    """The results by stack and origin, those of one context and as many minutes; the best stack first.

    Raises:
        ValueError: no results, or those of several contexts or minutes.
    """
    groups: Groups = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = results.load(path)
        groups[name_of(record)].append(record)
    if not groups:
        raise ValueError(f"{folder} holds no *.json: expected results of python -m benchmarks.learning.equal_time")
    for name in ("context", "minutes", "batch"):
        found = {record[name] for records in groups.values() for record in records if record["converted"] is None}
        if len(found) > 1:
            raise ValueError(f"{folder} holds runs of {name} {sorted(found)}: expected one folder for each")
    return dict(sorted(groups.items(), key=lambda item: fmean(map(bits_of, item[1]))))


def name_of(record: Record) -> str:
    """The stack, and what it was converted from."""
    if record["converted"] is None:
        return str(record["stack"])
    share = f"{100 * record['share']:g}% of its tokens at {record['rate']:g} of its rates"
    return f"{record['stack']} from {record['converted']}, after {share}"


def scores_of(record: Record) -> Record:
    """Those at the length of training."""
    return dict(record["at"][str(record["context"])])


def bits_of(record: Record) -> float:
    return float(scores_of(record)["bits"])


def step_seconds(record: Record) -> float | None:
    """Of the kernels that trained; None where the steps were not timed."""
    found = record["seconds_a_step"].get(record["dense_by"])
    return None if found is None else float(found)


def speed(record: Record) -> float | None:
    """Tokens a second; None where the steps were not timed."""
    seconds = step_seconds(record)
    return None if seconds is None else record["batch"] * record["context"] / seconds


def from_scratch(groups: Groups) -> Groups:
    """The runs that began with random weights."""
    return {name: records for name, records in groups.items() if records[0]["converted"] is None}


def comparison(groups: Groups, baseline: str | None = None) -> Table:
    """Every stack that began with random weights beside the baseline, the best first.

    Args:
        baseline: by default balanced, or else the best.

    Raises:
        ValueError: no run of the baseline, or of its seeds.
    """
    groups = from_scratch(groups)
    if not groups:
        raise ValueError("a folder holds converted runs alone: expected some that began with random weights")
    if baseline is None:
        baseline = BASELINE if BASELINE in groups else next(iter(groups))
    if baseline not in groups:
        raise ValueError(f"no run of {baseline!r}: expected one among {list(groups)}")
    counts = {len(scores_of(one)["by_window"]) for records in groups.values() for one in records}
    if len(counts) > 1:
        raise ValueError(f"results of {sorted(counts)} held-out windows: expected one number of them (--held-out)")
    scored = {name: [{"seed": one["seed"], **scores_of(one)} for one in records] for name, records in groups.items()}
    distances = list(scored[baseline][0]["copied"])
    rows = []
    for name, records in groups.items():
        off, width = difference(scored[name], scored[baseline], "by_window")
        speeds = [speed(one) for one in records]
        memory = [one["peak_bytes"] for one in records]
        steps = [one["steps"] for one in records]
        rows.append(
            (
                name,
                f"{records[0]['cost']:.3f}",
                " to ".join(f"{count:,}" for count in sorted({min(steps), max(steps)})),
                "-" if None in speeds else f"{fmean(filter(None, speeds)) / 1e3:,.0f}k",
                "-" if None in memory else f"{max(memory) / 2**30:.1f}",
                f"{fmean(map(bits_of, records)):.4f}",
                "0" if name == baseline else f"{off:+.4f} +- {width:.4f}",
                *(f"{fmean(one['copied'][distance] for one in scored[name]):.2f}" for distance in distances),
                str(len(records)),
            )
        )
    copied = tuple(f"bits of a passage {int(distance):,} back" for distance in distances)
    columns = (
        "stack",
        "pairs of dense",
        "steps",
        "tokens/s",
        "GiB",
        "bits a byte",
        f"behind {baseline}",
        *copied,
        "seeds",
    )
    return Table("Equal time", columns, tuple(rows))


def conversions(groups: Groups) -> Table:
    """Converted runs, each beside the run whose weights it began with.

    Raises:
        ValueError: a run whose origin is not among the results.
    """
    origins = {
        f"{kinds.file_name(record['stack'])}-{record['seed']}": record
        for one in from_scratch(groups).values()
        for record in one
    }
    converted = [record for records in groups.values() for record in records if record["converted"] is not None]
    order = lambda one: (one["converted"], -one["cost"], one["stack"], one["rate"], one["share"])  # noqa: E731
    rows = []
    for record in sorted(converted, key=order):
        if record["converted"] not in origins:
            raise ValueError(
                f"no result of {record['converted']}, the origin of a converted run: expected both in one folder"
            )
        origin = origins[record["converted"]]
        off, width = difference([scores_of(record) | {"seed": 0}], [scores_of(origin) | {"seed": 0}], "by_window")
        copied = (f"{bits:.2f}" for bits in scores_of(record)["copied"].values())
        share = f"{100 * record['share']:g}%"
        cost = f"{record['cost']:.3f}"
        rows.append((origin["stack"], record["stack"], cost, share, f"{off:+.4f} +- {width:.4f}", *copied))
    distances = list(scores_of(converted[0])["copied"]) if converted else []
    copied_columns = (f"bits of a passage {int(distance):,} back" for distance in distances)
    columns = ("from", "to", "pairs of dense", "after", "bits a byte behind the first model", *copied_columns)
    return Table("Conversions", columns, tuple(rows))


def at_lengths(groups: Groups) -> Groups:
    """The runs from random weights that were scored at other lengths too."""
    return {name: records for name, records in from_scratch(groups).items() if len(records[0]["at"]) > 1}


def lengths(groups: Groups) -> Table:
    """Bits a byte, and of copied passages, at the context and at other lengths.

    Raises:
        ValueError: models that were scored at different lengths.
    """
    groups, rows = at_lengths(groups), []
    all_scored = {tuple(one["at"]) for records in groups.values() for one in records}
    if len(all_scored) > 1:
        raise ValueError(f"models scored at the lengths {sorted(all_scored)}: expected the same --read for all")
    scored = list(next(iter(all_scored), ()))
    for name, records in groups.items():
        mean = lambda length, score, records=records: fmean(score(one["at"][length]) for one in records)  # noqa: E731
        bits = (f"{mean(length, lambda at: at['bits']):.4f}" for length in scored)
        copied = (f"{mean(length, lambda at: at['copied']['1024']):.2f}" for length in scored)
        farthest = list(records[0]["at"][scored[-1]]["copied"])[-1]
        far = f"{mean(scored[-1], lambda at, farthest=farthest: at['copied'][farthest]):.2f}"
        rows.append((name, *bits, *copied, far))
    if not rows:
        return Table("Other lengths", ("stack",), ())
    texts = tuple(f"{int(length):,}" for length in scored)
    columns = (
        "stack",
        *(f"bits a byte at {text}" for text in texts),
        *(f"of a passage 1,024 back at {text}" for text in texts),
        f"{int(farthest):,} back at {texts[-1]}",
    )
    return Table("Other lengths", columns, tuple(rows))


def picture(folders: Sequence[Groups], path: Path) -> Path:
    """Bits of the training text against minutes, the mean of a stack's seeds, a panel for each context.

    Raises:
        ValueError: no run that began with random weights, or a path whose suffix names no format of pictures.
    """
    folders = [from_scratch(groups) for groups in folders]
    if not all(folders):
        raise ValueError(
            "a folder holds converted runs alone: expected some that began with random weights for a picture"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(2, len(folders))
    rows = math.ceil(len(folders) / columns)
    figure = new_figure(4.6 * columns + 2.2, 3.9 * rows + 0.4, "Training loss by minutes on one GPU")
    names = list(dict.fromkeys(name for groups in folders for name in groups))
    colours = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    lines = {}
    panels = [figure.add_subplot(rows, columns, place) for place in range(1, len(folders) + 1)]
    for axes, groups in zip(panels, folders, strict=True):
        quiet(axes)
        for name, records in groups.items():
            if timed := [one for one in records if step_seconds(one) is not None]:
                (lines[name],) = axes.plot(*mean_curve(timed), color=colours[name], label=name, linewidth=1.2)
        context = next(iter(groups.values()))[0]["context"]
        axes.set(xlabel="minutes", title=f"{context:,} bytes of context", yscale="log", ylim=(0.6, 8))
        axes.title.set(size=9)
        axes.grid(alpha=0.2)
        axes.set_yticks([0.75, 1, 1.5, 2, 4, 8], ["0.75", "1", "1.5", "2", "4", "8"])
        axes.minorticks_off()
    for axes in panels[::columns]:
        axes.set(ylabel="bits a byte")
    figure.legend(handles=list(lines.values()), loc="outside right center", frameon=False, fontsize=8)
    return save(figure, path)


def lengths_picture(folders: Sequence[Groups], path: Path) -> Path:
    """Bits a byte by position in the longest texts that models were scored on, a panel for each context.

    Raises:
        ValueError: no model was scored at another length, or a path whose suffix names no format of pictures.
    """
    folders = [groups for groups in map(at_lengths, folders) if groups]
    if not folders:
        raise ValueError("no model was scored at other lengths (--read): expected one for a picture of lengths")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(6.2 * len(folders), 4.2, "Bits a byte beyond the context of training")
    for axes, groups in zip(np.atleast_1d(figure.subplots(1, len(folders))), folders, strict=True):
        quiet(axes)
        context = next(iter(groups.values()))[0]["context"]
        for place, (name, records) in enumerate(groups.items()):
            ranges = records[0]["at"][max(records[0]["at"], key=int)]["by_position"]
            edges = [tuple(map(int, text.split(" to "))) for text in ranges]
            bits = [
                fmean(one["at"][max(one["at"], key=int)]["by_position"][text] for one in records) for text in ranges
            ]
            axes.stairs(
                bits,
                [edges[0][0] or 128, *(stop for _, stop in edges)],
                color=COLORS[place % len(COLORS)],
                label=name,
                baseline=None,
            )
        axes.axvline(context, color="0.5", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel=f"position (trained on {context:,} bytes: dotted line)", ylabel="bits a byte")
        ticks = [256, 1024, 4096, 16384, 65536]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def mean_curve(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Minutes, and the mean of the runs' smoothed bits, as far as the shortest run goes. The steps of all were timed."""
    curves = []
    for record in records:
        steps, _, bits = np.array(record["curve"]).T
        seconds = step_seconds(record)
        assert seconds is not None
        curves.append((steps * seconds / 60, smooth(bits)))
    minutes = curves[0][0][curves[0][0] <= min(times[-1] for times, _ in curves)]
    return minutes, np.mean([np.interp(minutes, times, bits) for times, bits in curves], axis=0)


def smooth(values: np.ndarray, count: int = 9) -> np.ndarray:
    """The mean of a value and those before it, ``count`` in all."""
    padded = np.concatenate((np.full(count - 1, values[0]), values))
    return np.convolve(padded, np.full(count, 1 / count), mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.equal_time_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folders", type=Path, nargs="+", help="folders of results, each of one context")
    parser.add_argument("--to", type=Path, help="the picture to draw; without it there is none")
    parser.add_argument("--lengths-to", type=Path, help="the picture of other lengths to draw")
    parser.add_argument("--baseline", help="what the others stand beside; balanced by default, or else the best")
    options = parser.parse_args()
    try:
        folders = [load(folder) for folder in options.folders]
        for folder, groups in zip(options.folders, folders, strict=True):
            tables = (comparison(groups, options.baseline), conversions(groups), lengths(groups))
            print("\n\n".join((str(folder), *(table.markdown() for table in tables if table.rows))) + "\n")
        if options.to is not None:
            print(picture(folders, options.to))
        if options.lengths_to is not None:
            print(lengths_picture(folders, options.lengths_to))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
