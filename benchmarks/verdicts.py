"""The figures that have limits, computed from a result's raw repetitions, and whether they are reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A figure and its limit, an upper one unless ``at_least``; ``judged`` is False where the sizes say nothing."""

    what: str
    value: float
    limit: float
    judged: bool = True
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        if not self.judged:
            return "not judged"
        return "reached" if self.reached else "missed"


def verdicts(result: Result) -> list[Verdict]:
    """Every figure of the sections that the run covered."""
    found = [speed_verdict(result, record, which) for record in result["speed"] for which in record["passes"]]
    found += [memory_verdict(result, record) for record in result["memory"]]
    found += [growth_verdict(result, record) for record in result["growth"]]
    found += [stream_verdict(result, record) for record in result.get("stream", [])]
    return [*found, import_verdict(result)] if result["import"] else found


def summary(result: Result) -> Iterator[str]:
    """Reached or missed, plainly, and what makes a figure doubtful."""
    device = result["device"]
    before, after, cores = device["load_average"], device["load_average_after"], device["cores"]
    # The run itself keeps every core busy, so afterwards only what exceeds them is somebody else's.
    if before > cores / 2 or after > cores + 1:
        yield (
            f"The machine was busy with something else (load average {before} before the run and {after} after it on "
            f"{cores} cores): times are not to be relied on."
        )
    yield from summary_of(verdicts(result), result["judged"])


def summary_of(found: list[Verdict], judged: bool) -> Iterator[str]:
    """How many limits are reached, and each that is not."""
    if not judged:
        yield "Sizes too small to judge: nothing is reached or missed."
        return
    yield f"{sum(one.reached for one in found)} of {len(found)} limits reached."
    for one in found:
        if not one.reached:
            yield f"Missed: {one.what}: {one.value:.3g}, limit {'at least ' if one.at_least else ''}{one.limit:g}."


def flop_scaled_ratio(record: Result, seconds: dict[str, list[float]], name: str = "ours") -> float:
    """Median time over the same-FLOP kernel's, which is scaled to the same score FLOPs."""
    return statistics.median(seconds[name]) / statistics.median(seconds["same_flop"]) / float(record["flop_ratio"])


def speed_verdict(result: Result, record: Result, which: str) -> Verdict:
    value = flop_scaled_ratio(record, record["passes"][which]["judged"])
    what = f"time over the same-FLOP kernel, {place(record['case'], which)}"
    return Verdict(what, value, result["limits"]["speed"][which], result["judged"])


def memory_verdict(result: Result, record: Result) -> Verdict:
    """Peak resident bytes beyond the inputs, in sizes of the output."""
    limit = result["limits"]["memory"][record["pass"]][record["case"]["dtype"]]
    value = statistics.median(record["peak_bytes"]) / record["output_bytes"]
    what = f"memory beyond the inputs in outputs, {place(record['case'], record['pass'])}"
    return Verdict(what, value, limit, result["judged"])


def growth_verdict(result: Result, record: Result) -> Verdict:
    """The largest median time per token over the smallest, less 1."""
    values = per_token(record).values()
    what = f"growth of the time per token, {record['dtype']}"
    return Verdict(what, max(values) / min(values) - 1, result["limits"]["growth"], result["judged"])


def stream_verdict(result: Result, record: Result) -> Verdict:
    """Peak resident memory of the last tenth of a stream over that of the second, which has nothing left to load, less 1."""
    value = record["peak_bytes"][-1] / record["peak_bytes"][1] - 1
    what = f"growth of the memory over {record['read']:,} tokens read"
    return Verdict(what, value, result["limits"]["stream"], result["judged"])


def import_verdict(result: Result) -> Verdict:
    value = statistics.median(result["import"]["longnet_seconds"])
    what = "import longnet beyond import torch, seconds"
    return Verdict(what, value, result["limits"]["import_seconds"], result["judged"])


def per_token(record: Result) -> dict[int, float]:
    """Median microseconds per token by length."""
    return {length: statistics.median(record["seconds"][str(length)]) / length * 1e6 for length in record["lengths"]}


def place(case: Result, which: str) -> str:
    return f"N={case['length']} {case['dtype']} {pass_name(which)}"


def pass_name(which: str) -> str:
    return {"forward": "forward", "forward_backward": "fwd+bwd"}[which]
