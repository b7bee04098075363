"""A GPU result as tables: everything printed is computed from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.verdicts import (
    against_reference,
    ceiling,
    dense_decoding_verdict,
    factor,
    gigapath_verdict,
    growth_verdict,
    median,
    memory_verdict,
    per_token,
    position_verdict,
    reference_seconds,
    reference_verdict,
    torchscale_verdict,
    verdicts,
)
from benchmarks.tables import Row, Table, commit_name
from benchmarks.timing import quartiles
from benchmarks.verdicts import Result, Verdict, pass_name, summary_of

_NONE = "-"
_REFERENCES = {"same_flop": "same-FLOP kernel", "dense": "dense cuDNN"}


def header(result: Result) -> str:
    """One line: commit, versions, device."""
    versions, device = result["versions"], result["device"]
    listed = ", ".join(f"{name} {versions[name]}" for name in ("longnet", "torch", "triton", "cuda", "cudnn"))
    return (
        f"{commit_name(result['commit'])}, {result['date']}; {listed}; {device['model']} "
        f"({device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB)"
    )


def tables(result: Result) -> list[Table]:
    """Every section that the run covered."""
    makers = {
        "checks": _checks,
        "ceilings": _ceilings,
        "speed": _speed,
        "memory": _memory,
        "gigapath": _gigapath,
        "growth": _growth,
        "longest": _longest,
        "stream": _stream,
    }
    return [make(result) for section, make in makers.items() if result.get(section)]


def summary(result: Result) -> Iterator[str]:
    """Reached or missed, plainly."""
    return summary_of(verdicts(result), result["judged"])


def _peers(result: Result) -> list[str]:
    return [peer["name"] for peer in result["peers"] if peer["why_not"] is None]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _causal(record: Result) -> str:
    return "yes" if record["case"]["is_causal"] else "no"


def _judged(verdict: Verdict | None) -> tuple[str, str]:
    return (_NONE, _NONE) if verdict is None else (f"{verdict.limit:.4g}", str(verdict))


def _checks(result: Result) -> Table:
    every = list(result["checks"])
    for section in ("speed", "memory", "gigapath", "growth", "longest", "stream"):
        every += [check for record in result.get(section, []) for check in record["checks"]]
    worst = max(every, key=lambda check: check["error"] / check["allowed"])
    row = (str(len(every)), worst["what"], f"{worst['error']:.2g}", f"{worst['allowed']:.2g}")
    columns = ("checks", "nearest to its limit", "error", "allowed")
    return Table("Checks against the float64 definition, all passed", columns, (row,))


def _ceilings(result: Result) -> Table:
    found, side = ceiling(result), result["ceilings"]["matrix_side"]
    columns = (f"bf16 matrix product, {side} cubed, TFLOP/s", "copy, read plus written, TB/s")
    return Table("Ceilings, measured in the same run", columns, ((f"{found['tflops']:.0f}", f"{found['tbytes']:.2f}"),))


def _speed(result: Result) -> Table:
    peers = _peers(result)
    columns = (
        *("N", "D", "causal", "pass", "longnet ms", "quartiles ms", "against", "its ms", "ratio", "quartiles of pairs"),
        *("limit", "verdict", "visited"),
        *(title for name in peers for title in _peer_columns(name)),
    )
    rows = tuple(_speed_row(result, record, peers) for record in result["speed"])
    brief = (
        *("N", "D", "causal", "pass", "longnet ms", "against", "its ms", "ratio", "limit", "verdict", "visited"),
        *(title for name in peers if name == "torchscale" for title in _peer_columns(name)),
    )
    return Table("Speed", columns, rows, tuple(_speed_notes(result)), brief)


def _peer_columns(name: str) -> Row:
    columns = (f"{name} ms", f"{name} / longnet")
    return (*columns, f"{name} limit", f"{name} verdict") if name == "torchscale" else columns


def _speed_row(result: Result, record: Result, peers: list[str]) -> Row:
    judged, ours = record["judged"], record["judged"]["ours"]
    pairs = [one / other / record["ratio"] for one, other in zip(ours, judged[record["reference"]], strict=True)]
    cells: list[str] = []
    for name in peers:
        value = factor(record, name)
        cells += (_NONE, _NONE) if value is None else (_ms(median(record["beside"][name])), f"{value:.2f}")
        if name == "torchscale":
            cells += _judged(torchscale_verdict(result, record))
    low, _, high = quartiles(ours)
    low_pair, _, high_pair = quartiles(pairs)
    return (
        f"{record['case']['length']:,}",
        str(record["case"]["head_dim"]),
        _causal(record),
        pass_name(record["pass"]),
        _ms(median(ours)),
        f"{_ms(low)} to {_ms(high)}",
        _REFERENCES[record["reference"]],
        _ms(reference_seconds(record)),
        f"{against_reference(record):.3f}",
        f"{low_pair:.3f} to {high_pair:.3f}",
        *_judged(reference_verdict(result, record)),
        f"{record['visited']:.0%}",
        *cells,
    )


def _speed_notes(result: Result) -> Iterator[str]:
    ratios = sorted({record["ratio"] for record in result["speed"] if record["reference"] == "same_flop"})
    yield (
        "Same-FLOP kernel: cuDNN attention on dense blocks of random data, its time multiplied by the exact ratio of score "
        f"pairs ({', '.join(f'{ratio:g}' for ratio in ratios)}); the ratio to it is the tax. Dense cuDNN: over the whole "
        "sequence, another function. Visited: score pairs that these kernels compute, as a share of the pattern's, since a "
        "key that several branches share is computed once with a weight. So the ratio is no measure of how well the "
        "hardware is used."
    )
    walls = [record for record in result["speed"] if "wall" in record]
    for record in walls:
        ours, other = record["wall"]["ours"], record["wall"][record["reference"]]
        where = f"N={record['case']['length']} D={record['case']['head_dim']} causal {_causal(record)}"
        yield (
            f"{where} {pass_name(record['pass'])}, calls back to back by the host's clock: longnet {_ms(ours)} ms, "
            f"{_REFERENCES[record['reference']]} {_ms(other)} ms (not scaled)."
        )
    yield from _peer_notes(result, "speed")


def _peer_notes(result: Result, section: str) -> Iterator[str]:
    for peer in result["peers"]:
        if peer["why_not"]:
            yield f"{peer['name']} not timed: {peer['why_not']}."
            continue
        # Once, with the first table that has it.
        for remark in peer["remarks"] if section == "speed" or not result["speed"] else ():
            yield f"{peer['name']}: {remark}."
        reasons: dict[str, list[str]] = {}
        for record in result[section]:
            if peer["name"] in record["left_out"]:
                where = f"N={record['case']['length']} D={record['case']['head_dim']} causal {_causal(record)}"
                reasons.setdefault(record["left_out"][peer["name"]], []).append(f"{where} {pass_name(record['pass'])}")
        for reason, places in reasons.items():
            yield f"{peer['name']} left out at {'; '.join(places)}: {reason}."


def _memory(result: Result) -> Table:
    peers = [name for name in _peers(result) if any(name in record["beside"] for record in result["memory"])]

    def row(record: Result) -> Row:
        verdict = memory_verdict(result, record)
        beside = (record["beside"].get(name) for name in peers)
        return (
            f"{record['case']['length']:,}",
            str(record["case"]["head_dim"]),
            _causal(record),
            pass_name(record["pass"]),
            f"{record['output_bytes'] / 2**30:.3g}",
            f"{verdict.value:.2f}",
            *_judged(verdict),
            *("out of memory" if size is None else f"{size / 2**30:.1f}" for size in beside),
        )

    columns = (
        *("N", "D", "causal", "pass", "output GiB", "beyond q, k, v GiB", "limit", "verdict"),
        *(f"{name} GiB" for name in peers),
    )
    note = (
        "Most bytes that torch's allocator held at once, the output and, for fwd+bwd, the gradient given for it, three "
        "gradients and statistics included."
    )
    return Table("Memory", columns, tuple(map(row, result["memory"])), (note,))


def _gigapath(result: Result) -> Table:
    peers = [name for name in _peers(result) if any(name in record["beside"] for record in result["gigapath"])]

    def row(record: Result) -> Row:
        case, low_high = record["case"], quartiles(record["seconds"])
        cells = (_NONE if name not in record["beside"] else _ms(median(record["beside"][name])) for name in peers)
        value = factor(record, "torchscale")
        return (
            f"{case['length']:,}",
            str(case["head_dim"]),
            case["dtype"],
            _ms(low_high[1]),
            f"{_ms(low_high[0])} to {_ms(low_high[2])}",
            *cells,
            _NONE if value is None else f"{value:.2f}",
            *_judged(gigapath_verdict(result, record)),
        )

    columns = (
        *("N", "D", "dtype", "longnet ms", "quartiles ms", *(f"{name} ms" for name in peers)),
        *("torchscale / longnet", "limit", "verdict"),
    )
    pattern = result["gigapath"][0]["case"]
    lists = (", ".join(map(str, pattern[name])) for name in ("segment_lengths", "dilation_rates"))
    note = (
        f"Forward, not causal, segments {' at rates '.join(lists)}. At lengths that segments do not divide torchscale "
        "attends to the zeros that it pads them with."
    )
    notes = (note, *_peer_notes(result, "gigapath"))
    return Table("GigaPath's shape", columns, tuple(map(row, result["gigapath"])), notes)


def _growth(result: Result) -> Table:
    def row(record: Result) -> Row:
        verdict = growth_verdict(result, record)
        cells = (f"{value:.3f}" for value in per_token(record).values())
        return (pass_name(record["pass"]), *cells, f"{verdict.value:.1%}", f"{verdict.limit:.0%}", str(verdict))

    first = result["growth"][0]
    lengths = (f"N={length:,}" for length in first["lengths"])
    columns = ("pass", *lengths, "largest over smallest, less 1", "limit", "verdict")
    note = f"H={first['case']['heads']}, D={first['case']['head_dim']}, causal, the same heads at every length."
    title = "Growth: nanoseconds per token and head"
    return Table(title, columns, tuple(map(row, result["growth"])), (note,))


def _longest(result: Result) -> Table:
    def row(record: Result) -> Row:
        fails = _NONE if record["fails_at"] is None else f"{record['fails_at']:,}"
        return (
            str(record["case"]["heads"]),
            str(record["case"]["head_dim"]),
            pass_name(record["pass"]),
            f"{record['length']:,}",
            fails,
        )

    columns = ("H", "D", "pass", "longest N that fits", "N that does not")
    note = "One sequence, causal, q, k, v and all results held at once."
    return Table("Longest sequence", columns, tuple(map(row, result["longest"])), (note,))


def _stream(result: Result) -> Table:
    rows: list[Row] = []
    notes = []
    for record in result["stream"]:
        cache = f"{record['cache_bytes'] / 2**20:.1f}"
        if record["pass"] != "decode":
            nearest = max(record["checks"], key=lambda check: check["error"] / check["allowed"])
            error = f"error {nearest['error']:.2g}, allowed {nearest['allowed']:.2g}"
            rows.append((f"N={record['case']['length']:,}, {record['pass']}", cache, error, _NONE, _NONE))
            continue
        first, last = record["positions"][0], record["positions"][-1]
        for position in record["positions"]:
            micro = median(record["seconds"][str(position)]) * 1e6
            judged = _judged(position_verdict(result, record)) if position == last else (_NONE, _NONE)
            rows.append((f"a token near position {position:,}", cache, f"{micro:.1f} us", *judged))
        dense = dense_decoding_verdict(result, record)
        micro = median(record["seconds"]["dense"]) * 1e6
        where = f"dense decoding, {record['dense_tokens']:,} tokens cached"
        rows.append(
            (
                where,
                f"{record['dense_bytes'] / 2**20:.0f}",
                f"{micro:.1f} us, {dense.value:.2f} times ours",
                *_judged(dense),
            )
        )
        notes.append(
            f"A token's time by layer: a CUDA graph of {record['layers']} layers, {record['replays']} replays, medians of "
            f"{len(record['phases'])} phases of the pattern, the same ones after position {first:,} and {last:,}. A step reads "
            "the rows that its segments hold by then, so positions compare at the same phase."
        )
    return Table("Streaming", ("what", "cache MiB", "found", "limit", "verdict"), tuple(rows), tuple(notes))
