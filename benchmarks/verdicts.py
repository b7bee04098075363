"""The figures that have limits, computed from a result's raw repetitions, and whether they are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.cases import Record

_GIB = 2**30


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


Judge = Callable[[Record, Record], Verdict | None]


def verdicts(result: Record) -> list[Verdict]:
    """Every figure of the sections that the run covered, as far as it has a limit."""
    judges: dict[str, tuple[Judge, ...]] = {
        "speed": (speed, torchscale), "memory": (memory,), "gigapath": (gigapath,), "growth": (growth,),
        "stream": (position, dense_decoding) if on_gpu(result) else (reading,), "import": (import_time,),
    }  # fmt: skip
    every = (
        judge(result, record)
        for section, those in judges.items()
        for record in records(result, section)
        for judge in those
    )
    return [one for one in every if one is not None]


def records(result: Record, section: str) -> list[Record]:
    """What a section holds, as a list also where it is one record or was not run."""
    found = result.get(section) or []
    return [found] if isinstance(found, dict) else found


def summary(result: Record) -> Iterator[str]:
    """Reached or missed, plainly, and what makes a figure doubtful."""
    device = result["device"]
    if not on_gpu(result):
        before, after, cores = device["load_average"], device["load_average_after"], device["cores"]
        # The run itself keeps every core busy, so afterwards only what exceeds them is somebody else's.
        if before > cores / 2 or after > cores + 1:
            yield (
                f"The machine was busy with something else (load average {before} before the run and {after} after it on "
                f"{cores} cores): times are not to be relied on."
            )
    if result.get("failed") is not None:
        yield f"The run failed, and holds what was measured until then: {result['failed']}"
        return
    if not result["judged"]:
        yield f"{len(result['checks'])} results of small cases agreed with the definition."
        yield "Sizes too small to judge: nothing is reached or missed."
        return
    figures = verdicts(result)
    yield f"{sum(one.reached for one in figures)} of {len(figures)} limits reached."
    for one in figures:
        if not one.reached:
            yield f"Missed: {one.what}: {one.value:.3g}, limit {'at least ' if one.at_least else ''}{one.limit:g}."


def on_gpu(result: Record) -> bool:
    return bool(result["device"]["kind"] == "cuda")


def reference_seconds(record: Record) -> float:
    """Median seconds of the reference, scaled to the pattern's score pairs where it is the same-FLOP kernel."""
    return median(record["judged"][record["reference"]]) * float(record["ratio"])


def against_reference(record: Record) -> float:
    """Our median time over the reference's."""
    return median(record["judged"]["ours"]) / reference_seconds(record)


def factor(record: Record, name: str) -> float | None:
    """A peer's median time over ours in the same rounds; None when it was not timed."""
    seconds = record["beside"].get(name)
    return None if seconds is None else median(seconds) / median(record["beside"]["ours"])


def limit(result: Record, record: Record, kind: str) -> float | None:
    """The limit of this kind for a speed record, or None."""
    limits = result["limits"]["speed"]
    if isinstance(limits, dict):
        return float(limits[record["pass"]]) if kind == "tax" else None
    fields = {**record["case"], "pass": record["pass"]}
    for entry in limits:
        names = entry.keys() - {"kind", "limit"}
        if entry["kind"] == kind and all(fields[name] in entry[name] for name in names):
            return float(entry["limit"])
    return None


def _at(
    result: Record, record: Record, what: str, value: float | None, limit: float | None, at_least: bool = False
) -> Verdict | None:
    """The verdict on a cell, which its name says; None where there is no figure or no limit."""
    if value is None or limit is None:
        return None
    return Verdict(f"{what}, {place(result, record)}", value, limit, result["judged"], at_least)


def speed(result: Record, record: Record) -> Verdict | None:
    kind, other = (
        ("tax", "the same-FLOP kernel") if record["reference"] == "same_flop" else ("dense", "dense attention")
    )
    return _at(result, record, f"time over {other}", against_reference(record), limit(result, record, kind))


def torchscale(result: Record, record: Record) -> Verdict | None:
    what, least = "torchscale's time over ours", limit(result, record, "torchscale")
    return _at(result, record, what, factor(record, "torchscale"), least, at_least=True)


def gigapath(result: Record, record: Record) -> Verdict | None:
    what, least = "torchscale's time over ours", result["limits"]["gigapath"]
    return _at(result, record, what, factor(record, "torchscale"), least, at_least=True)


def memory(result: Record, record: Record) -> Verdict | None:
    """Peak bytes beyond the inputs: on a CPU in sizes of the output, on a GPU in GiB."""
    at_most = result["limits"]["memory"][record["pass"]]
    if on_gpu(result):
        return _at(result, record, "GiB beyond q, k, v", record["peak_bytes"] / _GIB, at_most / _GIB)
    value = median(record["peak_bytes"]) / record["output_bytes"]
    return _at(result, record, "memory beyond the inputs in outputs", value, at_most[record["case"]["dtype"]])


def growth(result: Record, record: Record) -> Verdict:
    """The largest median time per token over the smallest, less 1."""
    values = per_token(result, record).values()
    what = f"growth of the time per token, {record['pass'] if on_gpu(result) else record['case']['dtype']}"
    return Verdict(what, max(values) / min(values) - 1, result["limits"]["growth"], result["judged"])


def per_token(result: Record, record: Record) -> dict[int, float]:
    """By length, median microseconds per token; on a GPU nanoseconds per token and head."""
    unit = 1e9 / record["case"]["heads"] if on_gpu(result) else 1e6
    return {length: median(record["seconds"][str(length)]) / length * unit for length in record["lengths"]}


def reading(result: Record, record: Record) -> Verdict:
    """Peak resident memory of the last tenth of a stream over that of the second, which has nothing left to load, less 1."""
    value = record["peak_bytes"][-1] / record["peak_bytes"][1] - 1
    what = f"growth of the memory over {record['read']:,} tokens read"
    return Verdict(what, value, result["limits"]["stream"], result["judged"])


def position(result: Record, record: Record) -> Verdict | None:
    """Time of a token at the last position over that at the first, all phases of the pattern together, less 1."""
    if record["pass"] != "decode":
        return None
    first, last = (sum(record["seconds"][str(record["positions"][index])]) for index in (0, -1))
    what = f"a token's time at position {record['positions'][-1]:,} over that at {record['positions'][0]:,}, less 1"
    return Verdict(what, abs(last / first - 1), result["limits"]["stream"]["position"], result["judged"])


def dense_decoding(result: Record, record: Record) -> Verdict | None:
    if record["pass"] != "decode":
        return None
    ours = sum(record["seconds"][str(record["positions"][-1])]) / len(record["phases"])
    what = f"time of dense decoding with {record['dense_tokens']:,} tokens cached over ours"
    least = result["limits"]["stream"]["dense_decoding"]
    return Verdict(what, median(record["seconds"]["dense"]) / ours, least, result["judged"], at_least=True)


def import_time(result: Record, record: Record) -> Verdict:
    value, what = median(record["longnet_seconds"]), "import longnet beyond import torch, seconds"
    return Verdict(what, value, result["limits"]["import_seconds"], result["judged"])


def place(result: Record, record: Record) -> str:
    """A cell as text."""
    case = record["case"]
    if not on_gpu(result):
        return f"N={case['length']} {case['dtype']} {pass_name(record)}"
    causal = "causal" if case["is_causal"] else "not causal"
    return f"N={case['length']} H={case['heads']} D={case['head_dim']} {causal} {pass_name(record)}"


def pass_name(record: Record) -> str:
    return {"forward": "forward", "forward_backward": "fwd+bwd"}[record["pass"]]
