"""``python -m benchmarks.learning.report FOLDER --to PICTURES``: one table and four pictures of a folder of results."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.report import Table
from longnet.figures.style import COLORS, new_figure, quiet, save

# What the others stand beside: of these the first that a folder holds. It is the best that dense attention reaches.
BASELINES = ("dense with middle keys shifted, no far positions", "dense with middle keys shifted")

Record = dict[str, Any]
Groups = dict[str, list[Record]]


def load(folder: Path) -> Groups:
    """The results by name (pattern, and what was added to it), the seeds of each in order.

    Raises:
        ValueError: a folder without results, or with a damaged one.
    """
    found: Groups = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found[name_of(record)].append(record)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: expected a result of python -m benchmarks.learning") from None
    if not found:
        raise ValueError(f"{folder} holds no *.json: expected results of python -m benchmarks.learning")
    return dict(found)


def name_of(record: Record) -> str:
    """The pattern, and in what it differs from the plain model."""
    settings, shape = record["settings"], record["settings"]["shape"]
    more = {
        "AdamW": settings["matrix_lr"] is None,
        "shifted keys": shape["shift_keys"] and "keys shifted" not in record["arm"],
        "no far positions": not shape["far_positions"],
        f"{shape['sinks']} sinks": shape["sinks"] > 0,
    }
    return ", ".join((record["arm"], *(name for name, given in more.items() if given)))


def difference(records: list[Record], baseline: list[Record], key: str) -> tuple[float, float]:
    """Mean difference of bits a byte, window by window and seed by seed, and twice its standard error.

    Raises:
        ValueError: no seed that both have.
    """
    others = {record["seed"]: record for record in baseline}
    pairs = [(record, others[record["seed"]]) for record in records if record["seed"] in others]
    if not pairs:
        seeds = [sorted(record["seed"] for record in group) for group in (records, baseline)]
        raise ValueError(f"runs of the seeds {seeds[0]} beside those of {seeds[1]}: expected one seed that both have")
    by_seed = np.array([np.subtract(one[key], other[key]) for one, other in pairs])
    error = by_seed.std(axis=1, ddof=1).mean() / np.sqrt(by_seed.size)
    if len(pairs) > 1:
        # Seeds differ by more than windows do.
        error = np.hypot(error, by_seed.mean(1).std(ddof=1) / np.sqrt(len(pairs)))
    return float(by_seed.mean()), 2 * float(error)


def comparison(groups: Groups, baseline: str | None = None) -> Table:
    """Every pattern beside the baseline, cheapest first.

    Raises:
        ValueError: the results hold no baseline.
    """
    asked = BASELINES if baseline is None else (baseline,)
    baseline = next((name for name in asked if name in groups), None)
    if baseline is None:
        raise ValueError(f"none of {list(asked)} is among the results: expected one of {list(groups)}")
    rows = []
    for name, records in sorted(groups.items(), key=lambda item: item[1][0]["cost"]):
        mean = lambda key, records=records: fmean(record[key] for record in records)  # noqa: E731
        off, width = difference(records, groups[baseline], "by_window")
        late, late_width = difference(records, groups[baseline], "late_by_window")
        far = [record["repeated"].get("up to 4096") for record in records]
        speeds = [record["tokens_a_second"] for record in records]
        formed = [f"{record['formed']:,}" if record["formed"] else "-" for record in records]
        rows.append(
            (
                name,
                f"{records[0]['cost']:.3f}",
                f"{mean('bits'):.4f}",
                "0" if name == baseline else f"{off:+.4f} +- {width:.4f}",
                "0" if name == baseline else f"{late:+.4f} +- {late_width:.4f}",
                "-" if None in far else f"{fmean(far):.3f}",
                " ".join(formed),
                "-" if None in speeds else f"{fmean(speeds) / 1e3:,.0f}k",
                str(len(records)),
            )
        )
    columns = (
        "pattern",
        "cost",
        "bits a byte",
        f"behind {baseline}",
        "in the second half of the context",
        "bits of bytes that repeat those 2,048 to 4,096 before",
        "formed at step",
        "tokens/s",
        "seeds",
    )
    return Table("Patterns", columns, tuple(rows))


def pictures(groups: Groups, folder: Path, drawn: list[str] | None = None) -> list[Path]:
    """Bits against pairs, bits by position, recall by distance, loss curves.

    Args:
        drawn: names of the patterns that have lines; the first picture shows all.
    """
    lines = groups if drawn is None else {name: groups[name] for name in drawn}
    folder.mkdir(parents=True, exist_ok=True)
    draw = {"pairs": _pairs, "positions": _positions, "recall": _recall, "curves": _curves}
    titles = {
        "pairs": "Bits a byte against query-key pairs",
        "positions": "Bits a byte by position in the context",
        "recall": "Bits of repeated bytes by the distance of the last repetition",
        "curves": "Training loss",
    }
    made = []
    for name, panel in draw.items():
        shown = groups if name == "pairs" else lines
        # As high as its list.
        figure = new_figure(9, max(5.0, 1.0 + 0.18 * len(shown)), titles[name])
        axes = figure.add_subplot()
        quiet(axes)
        panel(axes, shown)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        made.append(save(figure, folder / f"learning-{name}.png"))
    return made


def _colours(groups: Groups) -> dict[str, str]:
    return {name: COLORS[place % len(COLORS)] for place, name in enumerate(groups)}


def _pairs(axes: Axes, groups: Groups) -> None:
    """Numbered by cost, with the list beside: names would lie on each other. What hardly learnt stands at the upper edge."""
    bits_of = {name: fmean(record["bits"] for record in records) for name, records in groups.items()}
    edge = 1.5 * min(bits_of.values())
    ordered = sorted(groups.items(), key=lambda item: item[1][0]["cost"])
    for number, (name, records) in enumerate(ordered, 1):
        bits = bits_of[name]
        if bits > edge:
            bits, name = edge, f"{name}: {bits:.2f} bits, off the scale"
        marker: dict[str, Any] = {
            "marker": f"${number}$",
            "color": COLORS[number % len(COLORS)],
            "s": 70 if number < 10 else 130,
        }
        axes.scatter(records[0]["cost"], bits, label=name, linewidths=0.2, **marker)
    axes.set(xlabel="pairs over those of dense attention", ylabel="bits a byte", xscale="log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.4, 1], ["0.05", "0.1", "0.2", "0.4", "1"])
    axes.minorticks_off()


def _positions(axes: Axes, groups: Groups) -> None:
    _lines(axes, groups, "by_position", lambda label: label.partition(" to ")[2])
    axes.set(xlabel="bytes before, up to", ylabel="bits a byte")


def _recall(axes: Axes, groups: Groups) -> None:
    _lines(axes, groups, "repeated", lambda label: label.removeprefix("up to "))
    axes.set(xlabel="distance in bytes, up to", ylabel="bits a byte")


def _lines(axes: Axes, groups: Groups, key: str, short: Any) -> None:
    for name, records in groups.items():
        labels = list(records[0][key])
        values = [fmean(record[key].get(label, np.nan) for record in records) for label in labels]
        axes.plot(
            [short(label) for label in labels],
            values,
            marker="o",
            markersize=3,
            color=_colours(groups)[name],
            label=name,
        )


def _curves(axes: Axes, groups: Groups) -> None:
    for name, records in groups.items():
        tokens = records[0]["tokens"] / records[0]["settings"]["steps"]
        for place, record in enumerate(records):
            steps, bits = zip(*record["curve"], strict=True)
            label = name if place == 0 else None
            axes.plot(np.array(steps) * tokens / 1e6, bits, color=_colours(groups)[name], label=label, linewidth=1.2)
    axes.set(xlabel="million bytes read in training", ylabel="bits a byte", ylim=(None, 2.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.report", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("results", type=Path, help="a folder that python -m benchmarks.learning wrote")
    parser.add_argument("--to", type=Path, help="folder to draw pictures into; without it there are none")
    parser.add_argument("--baseline", help=f"what the others are compared with; by default the first of {BASELINES}")
    parser.add_argument("--lines", help="patterns that are drawn as lines, by semicolons; all by default")
    options = parser.parse_args()
    try:
        groups = load(options.results)
        print(comparison(groups, options.baseline).markdown())
    except ValueError as error:
        parser.error(str(error))
    if options.to is not None:
        drawn = options.lines.split(";") if options.lines else None
        if unknown := [name for name in drawn or () if name not in groups]:
            parser.error(f"--lines names {unknown}: expected some of {list(groups)}")
        for path in pictures(groups, options.to, drawn):
            print(path)


if __name__ == "__main__":
    main()
