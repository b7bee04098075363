"""Weak scaling: time at the same tokens a device, over one device's, against the number of devices.

    python -m benchmarks.scaling_picture RESULT [RESULT ...] --to weak-scaling.png

Results are those of ``benchmarks.scaling``, one for each number of devices. Where later ranks have more query-key pairs
(segments without end, dense attention) the time is divided by the pairs of the busiest rank over one device's.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.cases import Record
from longnet.figures.style import COLORS, new_figure, quiet, save

# Above this the others would lie on one line.
HIGH = 3.0


def ratios(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """By pattern and number of devices.

    Raises:
        ValueError: results of other kinds, of one number of devices twice, or of several kinds of devices.
    """
    if wrong := {record["kind"] for record in records} - {"scaling"}:
        raise ValueError(f"results of kind {sorted(wrong)}: expected those of python -m benchmarks.scaling")
    devices = {record["device"] for record in records}
    if len(devices) != 1:
        raise ValueError(f"results of the devices {sorted(devices)}: expected one kind")
    points: dict[str, dict[int, float]] = defaultdict(lambda: {1: 1.0})
    for record in records:
        for row in record["patterns"]:
            name = row["pattern"] if row["even"] else f"{row['pattern']}, over pairs"
            if record["ranks"] in points[name]:
                raise ValueError(f"{name!r} was measured on {record['ranks']} devices twice: expected one result")
            points[name][record["ranks"]] = row["ratio"] if row["even"] else row["ratio"] / row["pairs"]
    return dict(points)


def picture(records: Sequence[Record], path: Path) -> Path:
    """A line for each pattern, and the limit.

    Raises:
        ValueError: as :func:`ratios`, or a path whose suffix names no format of pictures.
    """
    points = ratios(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(
        8.4, 4.2, f"Weak scaling on {records[0]['device']}: forward and backward, the same tokens a device"
    )
    axes = figure.subplots()
    quiet(axes)
    for place, (name, by_count) in enumerate(points.items()):
        counts = sorted(by_count)
        axes.plot(counts, [by_count[count] for count in counts], "o-", color=COLORS[place % len(COLORS)], label=name)
    limit = records[0]["limit"]
    if limit is not None:
        axes.axhline(limit, color="0.5", linewidth=1, linestyle=":", label=f"limit {limit:g}")
    ticks = sorted({count for by_count in points.values() for count in by_count})
    axes.set(xscale="log", xlabel="devices", ylabel="time over one device's", ylim=(0, None))
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    if max(value for by_count in points.values() for value in by_count.values()) > HIGH:
        axes.set(yscale="log", ylim=(0.9, None))
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_picture", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON of benchmarks.scaling")
    parser.add_argument("--to", type=Path, required=True, help="the picture to draw")
    options = parser.parse_args()
    try:
        print(picture([results.load(path) for path in options.results], options.to))
    except (ValueError, results.NoResult) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
