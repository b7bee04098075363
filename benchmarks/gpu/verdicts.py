"""The figures of a GPU result that have limits, from its raw repetitions, and whether they are reached."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.cases import place
from benchmarks.verdicts import Result, Verdict


def verdicts(result: Result) -> list[Verdict]:
    """Every figure of the sections that the run covered, as far as it has a limit."""
    found: list[Verdict | None] = []
    for record in result["speed"]:
        found += [reference_verdict(result, record), torchscale_verdict(result, record)]
    found += [memory_verdict(result, record) for record in result["memory"]]
    found += [gigapath_verdict(result, record) for record in result["gigapath"]]
    found += [growth_verdict(result, record) for record in result["growth"]]
    for record in result.get("stream", []):
        if record["pass"] == "decode":
            found += [position_verdict(result, record), dense_decoding_verdict(result, record)]
    return [one for one in found if one is not None]


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def reference_seconds(record: Result) -> float:
    """Median seconds of the reference, scaled to the pattern's score pairs where it is the same-FLOP kernel."""
    return median(record["judged"][record["reference"]]) * float(record["ratio"])


def against_reference(record: Result) -> float:
    """Our median time over the reference's: the tax, or what is left of dense attention's time."""
    return median(record["judged"]["ours"]) / reference_seconds(record)


def factor(record: Result, name: str) -> float | None:
    """A peer's median time over ours in the same rounds; None when it was not timed."""
    seconds = record["beside"].get(name)
    return None if seconds is None else median(seconds) / median(record["beside"]["ours"])


def limit(result: Result, record: Result, kind: str) -> float | None:
    """The limit of this kind for a speed record, or None."""
    fields = {**record["case"], "pass": record["pass"]}
    for entry in result["limits"]["speed"]:
        names = entry.keys() - {"kind", "limit"}
        if entry["kind"] == kind and all(fields[name] in entry[name] for name in names):
            return float(entry["limit"])
    return None


def reference_verdict(result: Result, record: Result) -> Verdict | None:
    kind = "tax" if record["reference"] == "same_flop" else "dense"
    at_most = limit(result, record, kind)
    if at_most is None:
        return None
    what = {"tax": "time over the same-FLOP kernel", "dense": "time over dense attention"}[kind]
    where = place(record["case"], record["pass"])
    return Verdict(f"{what}, {where}", against_reference(record), at_most, result["judged"])


def torchscale_verdict(result: Result, record: Result) -> Verdict | None:
    least, value = limit(result, record, "torchscale"), factor(record, "torchscale")
    if least is None or value is None:
        return None
    what = f"torchscale's time over ours, {place(record['case'], record['pass'])}"
    return Verdict(what, value, least, result["judged"], at_least=True)


def memory_verdict(result: Result, record: Result) -> Verdict:
    gib = 2**30
    what = f"GiB beyond q, k, v, {place(record['case'], record['pass'])}"
    at_most = result["limits"]["memory"][record["pass"]] / gib
    return Verdict(what, record["peak_bytes"] / gib, at_most, result["judged"])


def gigapath_verdict(result: Result, record: Result) -> Verdict | None:
    value = factor(record, "torchscale")
    if value is None:
        return None
    what = f"torchscale's time over ours, {place(record['case'], record['pass'])}"
    return Verdict(what, value, result["limits"]["gigapath"], result["judged"], at_least=True)


def growth_verdict(result: Result, record: Result) -> Verdict:
    """The largest median time per token over the smallest, less 1."""
    values = per_token(record).values()
    what = f"growth of the time per token, {record['pass']}"
    return Verdict(what, max(values) / min(values) - 1, result["limits"]["growth"], result["judged"])


def per_token(record: Result) -> dict[int, float]:
    """Median nanoseconds per token and head, by length."""
    heads = record["case"]["heads"]
    return {n: median(record["seconds"][str(n)]) / n / heads * 1e9 for n in record["lengths"]}


def position_verdict(result: Result, record: Result) -> Verdict:
    """Time of a token at the last position over that at the first, all phases of the pattern together, less 1."""
    first, last = (sum(record["seconds"][str(record["positions"][index])]) for index in (0, -1))
    what = f"a token's time at position {record['positions'][-1]:,} over that at {record['positions'][0]:,}, less 1"
    return Verdict(what, abs(last / first - 1), result["limits"]["stream"]["position"], result["judged"])


def dense_decoding_verdict(result: Result, record: Result) -> Verdict:
    ours = sum(record["seconds"][str(record["positions"][-1])]) / len(record["phases"])
    what = f"time of dense decoding with {record['dense_tokens']:,} tokens cached over ours"
    at_least = result["limits"]["stream"]["dense_decoding"]
    return Verdict(what, median(record["seconds"]["dense"]) / ours, at_least, result["judged"], at_least=True)


def ceiling(result: Result) -> dict[str, Any]:
    """TFLOP/s of the matrix product and TB/s of the copy."""
    found = result["ceilings"]
    return {
        "tflops": found["matrix_flops"] / median(found["seconds"]["matrix"]) / 1e12,
        "tbytes": found["copy_bytes"] / median(found["seconds"]["copy"]) / 1e12,
    }
