"""Time against length, log-log: the picture of a result's growth section."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

_STYLES = {"longnet": ("#1f5fbf", "o", "-"), "dense": ("#b3261e", "s", "--")}
_LABELS = {"dense": "dense SDPA"}


def plot_growth(result: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel per dtype: longnet, dense attention and peers, as far as each was timed.

    Raises:
        ValueError: the result has no growth section.
    """
    if not result["growth"]:
        raise ValueError("the result has no growth section: expected a run that includes it")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = result["growth"]
    figure, panels = pyplot.subplots(
        1, len(records), figsize=(5.2 * len(records), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, record in zip(panels[0], records, strict=True):
        for name, curve in {"longnet": record["seconds"], **record["curves"]}.items():
            colour, marker, line = _STYLES.get(name, ("#5f6368", "^", ":"))
            lengths = [int(length) for length in curve]
            seconds = [statistics.median(values) for values in curve.values()]
            panel.plot(lengths, seconds, marker=marker, linestyle=line, color=colour, label=_LABELS.get(name, name))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(record["lengths"], [_thousands(length) for length in record["lengths"]])
        panel.minorticks_off()
        panel.set_title(record["dtype"])
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("seconds, forward")
    device = result["device"]
    figure.suptitle(f"Causal attention on {device['threads']} threads of {device['model']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
