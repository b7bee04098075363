"""Results of ``benchmarks.learning.equal_time``: a table for each folder, and one picture.

    python -m benchmarks.learning.equal_time_report FOLDER [FOLDER ...] --to equal-time.png

A folder holds runs of one context. The picture leaves out those that began with the weights of another.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.learning.report import difference
from benchmarks.report import Table
from longnet.figures.style import COLORS, new_figure, quiet, save

Record = dict[str, Any]
Groups = dict[str, list[Record]]
BASELINE = "balanced"


def load(folder: Path) -> Groups:
    """The results by stack, those of one context and as many minutes; the best stack first.

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


def comparison(groups: Groups, baseline: str | None = None) -> Table:
    """Every stack beside the baseline, the best first.

    Args:
        baseline: by default balanced, or else the best.

    Raises:
        ValueError: no run of the baseline, or of its seeds.
    """
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
        rows.append(
            (
                name,
                f"{records[0]['cost']:.3f}",
                " ".join(f"{one['steps']:,}" for one in records),
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


def picture(folders: Sequence[Groups], path: Path) -> Path:
    """Bits of the training text against minutes, a panel for each context.

    Raises:
        ValueError: no run that began with random weights, or a path whose suffix names no format of pictures.
    """
    folders = [{name: one for name, one in groups.items() if one[0]["converted"] is None} for groups in folders]
    if not all(folders):
        raise ValueError(
            "a folder holds converted runs alone: expected some that began with random weights for a picture"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(4.2 * len(folders) + 2.2, 4.2, "Training loss by minutes on one GPU")
    names = list(dict.fromkeys(name for groups in folders for name in groups))
    colours = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    lines = {}
    for axes, groups in zip(np.atleast_1d(figure.subplots(1, len(folders), sharey=True)), folders, strict=True):
        quiet(axes)
        for name, records in groups.items():
            for record in records:
                if (seconds := step_seconds(record)) is None:
                    continue
                steps, _, bits = np.array(record["curve"]).T
                (lines[name],) = axes.plot(
                    steps * seconds / 60, smooth(bits), color=colours[name], label=name, linewidth=1.2
                )
        context = next(iter(groups.values()))[0]["context"]
        axes.set(xlabel="minutes", title=f"{context:,} bytes of context", yscale="log", ylim=(0.6, 8))
        axes.title.set(size=9)
        axes.grid(alpha=0.2)
        axes.set_yticks([0.75, 1, 1.5, 2, 4, 8], ["0.75", "1", "1.5", "2", "4", "8"])
        axes.minorticks_off()
    figure.axes[0].set(ylabel="bits a byte")
    figure.legend(handles=list(lines.values()), loc="outside right center", frameon=False, fontsize=8)
    return save(figure, path)


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
    parser.add_argument("--baseline", help="what the others stand beside; balanced by default, or else the best")
    options = parser.parse_args()
    try:
        folders = [load(folder) for folder in options.folders]
        for folder, groups in zip(options.folders, folders, strict=True):
            print(f"{folder}\n\n{comparison(groups, options.baseline).markdown()}\n")
        if options.to is not None:
            print(picture(folders, options.to))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
