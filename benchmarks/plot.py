"""Time against length, log-log: the picture of a result."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.cases import Record
from benchmarks.verdicts import on_gpu, pass_name

_STYLES = {"longnet": ("#1f5fbf", "o", "-"), "dense": ("#b3261e", "s", "--")}


def plot(result: Record, path: Path) -> None:
    """Write a PNG: longnet, dense attention and peers, as far as each was timed; a panel per dtype, on a GPU per pass.

    Raises:
        ValueError: the result has no growth section.
    """
    records, device, gpu = result.get("curves", ()), result["device"], on_gpu(result)
    if not records:
        raise ValueError("the result has no growth section: expected a run that includes it")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(records), figsize=(5.2 * len(records), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, record in zip(panels[0], records, strict=True):
        for name, seconds in record["seconds"].items():
            colour, marker, line = _STYLES.get(name, ("#5f6368", "^", ":"))
            times = [median(one) for one in seconds.values()]
            label = "dense attention" if name == "dense" else name
            panel.plot(list(map(int, seconds)), times, marker=marker, linestyle=line, color=colour, label=label)
        lengths = sorted({int(length) for seconds in record["seconds"].values() for length in seconds})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        panel.minorticks_off()
        panel.set_title(pass_name(record) if gpu else record["case"]["dtype"])
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("seconds")
    where = device["model"] if gpu else f"{device['threads']} threads of {device['model']}"
    figure.suptitle(f"Causal attention on {where}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
