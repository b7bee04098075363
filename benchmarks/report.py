"""A CPU result as tables: everything printed is computed from the JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.tables import Row, Table, commit_name
from benchmarks.timing import quartiles
from benchmarks.verdicts import (
    Result,
    flop_scaled_ratio,
    growth_verdict,
    import_verdict,
    memory_verdict,
    pass_name,
    per_token,
    place,
    speed_verdict,
    stream_verdict,
)


def header(result: Result) -> str:
    """One line: commit, versions, device."""
    commit, device, versions = result["commit"], result["device"], result["versions"]
    return (
        f"{commit_name(commit)}, {result['date']}; longnet {versions['longnet']}, torch {versions['torch']}, "
        f"Python {versions['python']}; {device['model']} ({device['capability']}), {device['threads']} threads on "
        f"{device['cores']} cores"
    )


def tables(result: Result) -> list[Table]:
    """Every section that the run covered."""
    makers = {
        "checks": _checks,
        "noise": _noise,
        "speed": _speed,
        "memory": _memory,
        "import": _import,
        "growth": _growth,
        "stream": _stream,
    }
    found = [make(result) for section, make in makers.items() if result.get(section)]
    if result.get("stream"):
        found.append(_kept(result))
    if result["memory_why_not"]:
        found.append(Table("Memory", ("not measured",), ((result["memory_why_not"],),)))
    return found


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f}"


def _checks(result: Result) -> Table:
    every = list(result["checks"])
    for section in ("noise", "speed", "memory", "growth"):
        every += [check for record in result[section] for check in record["checks"]]
    worst = max(every, key=lambda check: check["error"] / check["allowed"])
    row = (str(len(every)), worst["what"], f"{worst['error']:.2g}", f"{worst['allowed']:.2g}")
    columns = ("checks", "nearest to its limit", "error", "allowed")
    return Table("Checks against the float64 definition, all passed", columns, (row,))


def _noise(result: Result) -> Table:
    def row(record: Result) -> Row:
        first, second = record["seconds"]["first"], record["seconds"]["second"]
        middle = statistics.median(first + second)
        return (
            str(record["case"]["length"]),
            record["case"]["dtype"],
            f"{len(first)} + {len(second)}",
            f"{middle * 1e3:.1f}",
            f"{statistics.median(second) / statistics.median(first):.3f}",
            f"{(max(first + second) - min(first + second)) / middle:.1%}",
        )

    columns = ("N", "dtype", "runs", "median ms", "ratio of its two medians", "(max - min) / median")
    return Table("Noise: one and the same forward timed as two", columns, tuple(map(row, result["noise"])))


def _speed(result: Result) -> Table:
    peers = [peer["name"] for peer in result["peers"] if peer["why_not"] is None]
    rows = [_speed_row(result, record, which, peers) for record in result["speed"] for which in record["passes"]]
    columns = (
        *("N", "dtype", "pass", "same-FLOP kernel ms", "longnet ms", "ratio", "quartiles of pairs", "limit", "verdict"),
        *("ratio in (B, N, H, D) memory", "dense SDPA ms", *(f"{name} ms" for name in peers)),
    )
    brief = (*columns[:6], "limit", "verdict", "dense SDPA ms")
    return Table("Speed", columns, tuple(rows), tuple(_speed_notes(result)), brief)


def _speed_row(result: Result, record: Result, which: str, peers: list[str]) -> Row:
    judged, beside = record["passes"][which]["judged"], record["passes"][which]["beside"]
    factor, verdict = record["flop_ratio"], speed_verdict(result, record, which)
    pairs = [one / other / factor for one, other in zip(judged["ours"], judged["same_flop"], strict=True)]
    low, _, high = quartiles(pairs)
    return (
        str(record["case"]["length"]),
        record["case"]["dtype"],
        pass_name(which),
        f"{statistics.median(judged['same_flop']) * factor * 1e3:.1f}",
        _ms(judged["ours"]),
        f"{verdict.value:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{verdict.limit:g}",
        str(verdict),
        f"{flop_scaled_ratio(record, beside, 'ours_tokens_first'):.3f}",
        *(_ms(beside[name]) if name in beside else "-" for name in ("dense", *peers)),
    )


def _speed_notes(result: Result) -> Iterator[str]:
    factors = ", ".join(sorted({f"{record['flop_ratio']:g}" for record in result["speed"]}))
    yield f"Same-FLOP kernel: torch's own on dense blocks, its median times the ratio of score FLOPs ({factors})."
    for record in result["speed"]:
        for which, measured in record["passes"].items():
            for name, reason in measured["left_out"].items():
                yield f"{name} left out at {place(record['case'], which)}: {reason}."
    for peer in result["peers"]:
        if peer["why_not"]:
            yield f"{peer['name']} not timed: {peer['why_not']}."
        else:
            errors = ", ".join(f"{name} {error:.2g}" for name, error in peer["errors"].items())
            yield f"{peer['name']} with torch's CPU flash kernel lent to it; relative errors in float32: {errors}."


def _memory(result: Result) -> Table:
    def row(record: Result) -> Row:
        output, peak = record["output_bytes"], statistics.median(record["peak_bytes"])
        verdict = memory_verdict(result, record)
        return (
            str(record["case"]["length"]),
            record["case"]["dtype"],
            pass_name(record["pass"]),
            f"{output / 2**20:.1f}",
            f"{peak / 2**20:.1f}",
            f"{verdict.value:.2f}",
            f"{verdict.limit:g}",
            str(verdict),
            f"{record['live_peak_bytes'] / output:.2f}",
            f"{(peak + record['grad_out_bytes']) / output:.2f}",
        )

    columns = (
        *("N", "dtype", "pass", "output MiB", "peak beyond the inputs MiB", "in outputs", "limit", "verdict"),
        *("live alone, in outputs", "with the given gradient, in outputs"),
    )
    note = (
        "Resident memory at its peak (VmHWM, Linux), the result included, median of fresh processes. Inputs are q, k, v "
        "and, for fwd+bwd, the gradient given for out; the last column counts that gradient too. Live alone: one more "
        "process, with a malloc that keeps little of what is freed."
    )
    brief = ("N", "dtype", "pass", "in outputs", "limit", "verdict")
    return Table("Memory", columns, tuple(map(row, result["memory"])), (note,), brief)


def _import(result: Result) -> Table:
    verdict = import_verdict(result)
    row = (
        str(len(result["import"]["longnet_seconds"])),
        f"{statistics.median(result['import']['torch_seconds']):.2f}",
        f"{verdict.value:.3f}",
        f"{verdict.limit:g}",
        str(verdict),
    )
    return Table("Import", ("processes", "import torch s", "import longnet beyond it s", "limit", "verdict"), (row,))


def _growth(result: Result) -> Table:
    def row(record: Result) -> Row:
        verdict = growth_verdict(result, record)
        cells = (f"{value:.2f}" for value in per_token(record).values())
        return (record["dtype"], *cells, f"{verdict.value:.1%}", f"{verdict.limit:.0%}", str(verdict))

    lengths = (f"N={length}" for length in result["growth"][0]["lengths"])
    columns = ("dtype", *lengths, "largest over smallest, less 1", "limit", "verdict")
    return Table("Growth: forward, microseconds per token", columns, tuple(map(row, result["growth"])))


def _stream(result: Result) -> Table:
    def row(record: Result) -> Row:
        verdict = stream_verdict(result, record)
        peaks, seconds = record["peak_bytes"], record["seconds"]
        tenth = record["read"] / len(seconds)
        return (
            f"{record['read']:,}",
            f"{record['cache_bytes'] / 2**20:.1f}",
            *(f"{tenth / seconds[index]:,.0f}" for index in (0, -1)),
            *(f"{peaks[index] / 2**20:.0f}" for index in (0, 1, -1)),
            f"{verdict.value:.1%}",
            f"{verdict.limit:.0%}",
            str(verdict),
        )

    columns = (
        *("tokens", "cache MiB", "tokens/s, first tenth", "tokens/s, last tenth"),
        *(
            "peak MiB, first tenth",
            "peak MiB, second",
            "peak MiB, last",
            "last over second, less 1",
            "limit",
            "verdict",
        ),
    )
    record = result["stream"][0]
    lists = (", ".join(map(str, record[name])) for name in ("segment_lengths", "dilation_rates"))
    note = (
        f"A model of 2 layers, 64 wide, segments {' at rates '.join(lists)}, reads random bytes {record['chunk']:,} at a time "
        "and gives logits for each. Resident memory of the whole process."
    )
    return Table("Streaming", columns, tuple(map(row, result["stream"])), (note,))


def _kept(result: Result) -> Table:
    def row(record: Result) -> Row:
        kept, read = record["kept"], sum(record["seconds"])
        milliseconds = (f"{kept[f'{name}_seconds'] * 1e3:.1f}" for name in ("clone", "save", "load"))
        return (f"{record['read']:,}", f"{read:.1f}", *milliseconds, f"{kept['file_bytes'] / 2**20:.1f}")

    columns = ("tokens", "reading them s", "clone() ms", "to a file ms", "from the file ms", "file MiB")
    return Table("A prefix kept", columns, tuple(map(row, result["stream"])))
