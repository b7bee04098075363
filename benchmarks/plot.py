"""Time against length, log-log: the picture of a result."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.cases import Record
from benchmarks.verdicts import on_gpu, pass_name

_STYLES = {"longnet": ("#1f5fbf", "o", "-"), "dense": ("#b3261e", "s", "--")}
_LABELS = {"dense": "dense attention"}


def plot(result: Record, path: Path) -> None:
    """Write a PNG: longnet, dense attention and peers, as far as each was timed; a panel per dtype, on a GPU per pass.

    Raises:
        ValueError: the result has no growth section.
    """
    device, gpu = result["device"], on_gpu(result)
    where = device["model"] if gpu else f"{device['threads']} threads of {device['model']}"
    panels = {}
    for record in result.get("curves", ()):
        medians = {
            name: {int(length): statistics.median(seconds) for length, seconds in curve.items()}
            for name, curve in record["seconds"].items()
        }
        panels[pass_name(record) if gpu else record["case"]["dtype"]] = medians
    if not panels:
        raise ValueError("the result has no growth section: expected a run that includes it")
    _draw(panels, f"Causal attention on {where}", path)


def _draw(records: dict[str, dict[str, dict[int, float]]], title: str, path: Path) -> None:
    """``records``: seconds by length, by name, by the title of a panel."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(records), figsize=(5.2 * len(records), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (heading, curves) in zip(panels[0], records.items(), strict=True):
        for name, curve in curves.items():
            colour, marker, line = _STYLES.get(name, ("#5f6368", "^", ":"))
            label = _LABELS.get(name, name)
            panel.plot(list(curve), list(curve.values()), marker=marker, linestyle=line, color=colour, label=label)
        lengths = sorted({length for curve in curves.values() for length in curve})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [_thousands(length) for length in lengths])
        panel.minorticks_off()
        panel.set_title(heading)
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("seconds")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
