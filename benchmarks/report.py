"""Every kind of result as tables: what is printed and what stands in the documents is computed from the JSON alone.

A table is data: columns are templates that every row, a record and the figures computed from it, fills.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

from benchmarks import verdicts
from benchmarks.cases import PASSES, Record
from benchmarks.timing import quartiles
from benchmarks.verdicts import Verdict, factor, on_gpu, records

Row = tuple[str, ...]
Columns = dict[str, str]
_UNITS = {"ms": 1e3, "us": 1e6, "MB": 1e-6, "GB": 1e-9, "MiB": 2**-20, "GiB": 2**-30}
_NAMES = {"forward_backward": "fwd+bwd", "same_flop": "same-FLOP kernel", "dense": "dense cuDNN"}


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table alone, without its title and notes."""
        lines = (self.columns, ("---",) * len(self.columns), *self.rows)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def plain(self) -> str:
        """For a terminal: the title, aligned columns, the notes."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (self.columns, *self.rows))
        return "\n".join((self.title, *lines, *self.notes))


class _Template(string.Formatter):
    """``{seconds:.1f ms}``: the median of a list, in a unit; without a number, three digits.

    ``quartiles`` and ``count`` are formats of a list. None, and a field that a row lacks, is a dash.
    """

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except KeyError:
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return _NAMES.get(value, value)
        if format_spec == "count":
            return str(len(value))
        if format_spec.startswith("quartiles "):
            low, _, high = (self.format_field(one, format_spec.removeprefix("quartiles ")) for one in quartiles(value))
            return f"{low} to {high}"
        value = median(value) if isinstance(value, list) else value
        form, _, unit = format_spec.rpartition(" ")
        if unit not in _UNITS:
            return format(value, format_spec)
        value *= _UNITS[unit]
        return format(value, form or (".3g" if value < 100 else ".0f"))


_fill = _Template().vformat
_JUDGED = {"limit": "{limit:.4g}", "verdict": "{verdict}"}
_SHARE = {"limit": "{limit:.0%}", "verdict": "{verdict}"}
_CPU_CELL = {"N": "{case[length]}", "dtype": "{case[dtype]}", "pass": "{pass}"}
_GPU_CELL = {"N": "{case[length]:,}", "D": "{case[head_dim]}", "causal": "{case[is_causal]}", "pass": "{pass}"}
_WHERE = "N={case[length]} D={case[head_dim]} causal {case[is_causal]} {pass}"


def table(title: str, columns: Columns, rows: Iterable[Record], *notes: str) -> Table:
    """``columns``: by title, the template that each row fills."""
    cells = tuple(tuple(_fill(form, (), row) for form in columns.values()) for row in rows)
    return Table(title, tuple(columns), cells, notes)


def header(result: Record) -> str:
    """One line: commit, versions, device."""
    commit, versions, device = result["commit"], result["versions"], result["device"]
    sha = "no commit" if commit["sha"] is None else str(commit["sha"])[:12]
    sha += " with uncommitted changes" * bool(commit["dirty"])
    if "kind" in result:
        model = device if isinstance(device, str) else device.get("name", device.get("model"))
        return f"{sha}; torch {versions['torch']}, {model}"
    if on_gpu(result):
        listed = ", ".join(f"{name} {versions[name]}" for name in ("longnet", "torch", "triton", "cuda", "cudnn"))
        size = f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB"
        return f"{sha}, {result['date']}; {listed}; {device['model']} ({size})"
    return (
        f"{sha}, {result['date']}; longnet {versions['longnet']}, torch {versions['torch']}, "
        f"Python {versions['python']}; {device['model']} ({device['capability']}), {device['threads']} threads on "
        f"{device['cores']} cores"
    )


def tables(result: Record) -> list[Table]:
    """Every section that the run covered."""
    if "kind" in result:
        return _KINDS.get(result["kind"], lambda result: [])(result)
    makers = _GPU_TABLES if on_gpu(result) else _CPU_TABLES
    made = [make(result) for section, make in makers if result.get(section)]
    if result.get("memory_why_not"):
        made.append(Table("Memory", ("not measured",), ((result["memory_why_not"],),)))
    return made


def summary(result: Record) -> Iterator[str]:
    """Reached or missed, plainly."""
    if "kind" not in result:
        yield from verdicts.summary(result)
        return
    judged = [one for one in tables(result) if "verdict" in one.columns]
    verdicts_of = [
        (f"{one.title}, {row[0]}" if len(judged) > 1 else row[0], row[one.columns.index("verdict")])
        for one in judged
        for row in one.rows
    ]
    missed = [f"missed: {name}" for name, verdict in verdicts_of if verdict == "missed"]
    yield from missed or ["all limits reached"] * any(verdict == "reached" for _, verdict in verdicts_of)


def markdown(result: Record) -> str:
    """Everything that was measured, for a page."""
    parts = [header(result)]
    for one in tables(result):
        parts += [f"**{one.title}**", one.markdown(), *one.notes]
    return "\n\n".join([*parts, *summary(result)])


def plain(result: Record) -> str:
    """Everything that was measured, for a terminal or a log."""
    return "\n\n".join([header(result), *(one.plain() for one in tables(result)), "\n".join(summary(result))])


def _judged(verdict: Verdict | None) -> Record:
    """The fields of a row that say whether a limit is reached."""
    fields = (None,) * 3 if verdict is None else (verdict.value, verdict.limit, str(verdict))
    return dict(zip(("value", "limit", "verdict"), fields, strict=True))


def _rows(
    result: Record, section: str, judge: verdicts.Judge | None = None, **figures: Callable[[Record], Any]
) -> Iterator[Record]:
    """The records of a section, each with its verdict and further figures."""
    for record in records(result, section):
        judged = {} if judge is None else _judged(judge(result, record))
        yield record | judged | {name: figure(record) for name, figure in figures.items()}


def _peers(result: Record, section: str) -> list[str]:
    """Other implementations that were loaded and of which the section has a figure; all that were loaded for speed."""
    names = [peer["name"] for peer in result["peers"] if peer["why_not"] is None]
    return [name for name in names if section == "speed" or any(name in one["beside"] for one in result[section])]


def _pattern(record: Record) -> str:
    lists = (", ".join(map(str, record[name])) for name in ("segment_lengths", "dilation_rates"))
    return f"segments {' at rates '.join(lists)}"


def _errors(errors: Record, form: str) -> str:
    return ", ".join(f"{name} {error:{form}}" for name, error in errors.items())


def _worst(checks: Iterable[Record]) -> Record:
    return max(checks, key=lambda check: check["error"] / check["allowed"])


def _checks(result: Record) -> Table:
    sections = ("noise", "speed", "memory", "gigapath", "growth", "longest", "stream")
    every = [check for name in sections for one in records(result, name) for check in one.get("checks", ())]
    every = [*result["checks"], *every]
    columns = {
        "checks": "{count}",
        "nearest to its limit": "{what}",
        "error": "{error:.2g}",
        "allowed": "{allowed:.2g}",
    }
    # A run may have failed in its first check.
    rows = [_worst(every) | {"count": len(every)}] if every else []
    passed = "that passed" if result.get("failed") is not None else "all passed"
    return table(f"Checks against the float64 definition, {passed}", columns, rows)


def _noise(result: Record) -> Table:
    columns = {
        "N": "{case[length]}", "dtype": "{case[dtype]}", "runs": "{seconds[first]:count} + {seconds[second]:count}",
        "median ms": "{both:.1f ms}", "ratio of its two medians": "{ratio:.3f}",
        "(max - min) / median": "{spread:.1%}",
    }  # fmt: skip
    rows = []
    for record in result["noise"]:
        first, second = record["seconds"]["first"], record["seconds"]["second"]
        both, ratio = first + second, median(second) / median(first)
        rows.append(record | {"both": both, "ratio": ratio, "spread": (max(both) - min(both)) / median(both)})
    return table("Noise: one and the same forward timed as two", columns, rows)


def _ceilings(result: Record) -> Table:
    one = result["ceilings"]
    speeds = (one[key] / median(one["seconds"][key.split("_")[0]]) / 1e12 for key in ("matrix_flops", "copy_bytes"))
    row = dict(zip(("flops", "bytes"), speeds, strict=True))
    product = f"bf16 matrix product, {one['matrix_side']} cubed, TFLOP/s"
    columns = {product: "{flops:.0f}", "copy, read plus written, TB/s": "{bytes:.2f}"}
    return table("Ceilings, measured in the same run", columns, [row])


def _pairs(record: Record) -> list[float]:
    """Our time over the reference's, call by call."""
    both = zip(record["judged"]["ours"], record["judged"][record["reference"]], strict=True)
    return [ours / other / record["ratio"] for ours, other in both]


def _speed_rows(result: Record, **figures: Callable[[Record], Any]) -> Iterator[Record]:
    figures |= {"pairs": _pairs, "tax": verdicts.against_reference, "reference_seconds": verdicts.reference_seconds}
    return _rows(result, "speed", verdicts.speed, **figures)


def _cpu_speed(result: Record) -> Table:
    def tokens_first(record: Record) -> float:
        ours, other = (median(record["beside"][name]) for name in ("ours_tokens_first", "same_flop"))
        return ours / other / record["ratio"]

    columns = _CPU_CELL | {
        "same-FLOP kernel ms": "{reference_seconds:.1f ms}", "longnet ms": "{judged[ours]:.1f ms}",
        "ratio": "{tax:.3f}", "quartiles of pairs": "{pairs:quartiles .3f}", **_JUDGED,
        "ratio in (B, N, H, D) memory": "{tokens_first:.3f}", "dense SDPA ms": "{beside[dense]:.1f ms}",
        **{f"{name} ms": f"{{beside[{name}]:.1f ms}}" for name in _peers(result, "speed")},
    }  # fmt: skip
    return table("Speed", columns, _speed_rows(result, tokens_first=tokens_first), *_cpu_notes(result))


def _cpu_notes(result: Record) -> Iterator[str]:
    factors = ", ".join(sorted({f"{record['ratio']:g}" for record in result["speed"]}))
    yield f"Same-FLOP kernel: torch's own on dense blocks, its median times the ratio of score FLOPs ({factors})."
    for record in result["speed"]:
        for name, reason in record["left_out"].items():
            yield f"{name} left out at {verdicts.place(result, record)}: {reason}."
    for peer in result["peers"]:
        yield from _remarks(peer)


def _remarks(peer: Record) -> list[str]:
    if peer["why_not"]:
        return [f"{peer['name']} not timed: {peer['why_not']}."]
    return [f"{peer['name']}: {remark}." for remark in peer["remarks"]]


def _gpu_speed(result: Record) -> Table:
    peers = _peers(result, "speed")
    columns = _GPU_CELL | {
        "longnet ms": "{judged[ours]:ms}", "quartiles ms": "{judged[ours]:quartiles ms}", "against": "{reference}",
        "its ms": "{reference_seconds:ms}", "ratio": "{tax:.3f}", "quartiles of pairs": "{pairs:quartiles .3f}",
        **_JUDGED, "visited": "{visited:.0%}",
    }  # fmt: skip
    for name in peers:
        columns |= {f"{name} ms": f"{{beside[{name}]:ms}}", f"{name} / longnet": f"{{factors[{name}]:.2f}}"}
        if name == "torchscale":
            columns |= {"torchscale limit": "{theirs[limit]:.4g}", "torchscale verdict": "{theirs[verdict]}"}
    rows = _speed_rows(
        result,
        factors=lambda record: {name: factor(record, name) for name in peers},
        theirs=lambda record: _judged(verdicts.torchscale(result, record)),
    )
    return table("Speed", columns, rows, *_gpu_notes(result))


def _gpu_notes(result: Record) -> Iterator[str]:
    ratios = sorted({record["ratio"] for record in result["speed"] if record["reference"] == "same_flop"})
    yield (
        "Same-FLOP kernel: cuDNN attention on dense blocks of random data, its time multiplied by the exact ratio of score "
        f"pairs ({', '.join(f'{ratio:g}' for ratio in ratios)}); the ratio to it is the tax. Dense cuDNN: over the whole "
        "sequence, another function. Visited: score pairs that these kernels compute, as a share of the pattern's, since a "
        "key that several branches share is computed once with a weight. So the ratio is no measure of how well the "
        "hardware is used."
    )
    wall = (
        _WHERE + ", calls back to back by the host's clock: longnet {wall[ours]:ms} ms, "
        "{reference} {theirs:ms} ms (not scaled)."
    )
    for record in result["speed"]:
        if "wall" in record:
            yield _fill(wall, (), record | {"theirs": record["wall"][record["reference"]]})
    yield from _peer_notes(result, "speed")


def _peer_notes(result: Record, section: str) -> Iterator[str]:
    for peer in result["peers"]:
        # Remarks once, with the first table that has it.
        if peer["why_not"] or section == "speed" or not result["speed"]:
            yield from _remarks(peer)
        reasons: dict[str, list[str]] = {}
        for record in result[section]:
            if peer["name"] in record["left_out"]:
                reasons.setdefault(record["left_out"][peer["name"]], []).append(_fill(_WHERE, (), record))
        for reason, places in reasons.items():
            yield f"{peer['name']} left out at {'; '.join(places)}: {reason}."


def _cpu_memory(result: Record) -> Table:
    def with_gradient(record: Record) -> float:
        return float((median(record["peak_bytes"]) + record["grad_out_bytes"]) / record["output_bytes"])

    columns = _CPU_CELL | {
        "output MiB": "{output_bytes:.1f MiB}", "peak beyond the inputs MiB": "{peak_bytes:.1f MiB}",
        "in outputs": "{value:.2f}", **_JUDGED, "live alone, in outputs": "{live:.2f}",
        "with the given gradient, in outputs": "{with_gradient:.2f}",
    }  # fmt: skip
    live = lambda record: record["live_peak_bytes"] / record["output_bytes"]  # noqa: E731
    rows = _rows(result, "memory", verdicts.memory, live=live, with_gradient=with_gradient)
    note = (
        "Resident memory at its peak (VmHWM, Linux), the result included, median of fresh processes. Inputs are q, k, v "
        "and, for fwd+bwd, the gradient given for out; the last column counts that gradient too. Live alone: one more "
        "process, with a malloc that keeps little of what is freed."
    )
    return table("Memory", columns, rows, note)


def _gpu_memory(result: Record) -> Table:
    peers = _peers(result, "memory")

    def sizes(record: Record) -> Record:
        return {name: record["beside"].get(name) or "out of memory" for name in peers}

    columns = _GPU_CELL | {"output GiB": "{output_bytes:.3g GiB}", "beyond q, k, v GiB": "{value:.2f}", **_JUDGED}
    columns |= {f"{name} GiB": f"{{sizes[{name}]:.1f GiB}}" for name in peers}
    note = (
        "Most bytes that torch's allocator held at once, the output and, for fwd+bwd, the gradient given for it, three "
        "gradients and statistics included."
    )
    return table("Memory", columns, _rows(result, "memory", verdicts.memory, sizes=sizes), note)


def _import(result: Record) -> Table:
    columns = {
        "processes": "{longnet_seconds:count}", "import torch s": "{torch_seconds:.2f}",
        "import longnet beyond it s": "{longnet_seconds:.3f}", **_JUDGED,
    }  # fmt: skip
    return table("Import", columns, _rows(result, "import", verdicts.import_time))


def _gigapath(result: Record) -> Table:
    columns = {
        "N": "{case[length]:,}", "D": "{case[head_dim]}", "dtype": "{case[dtype]}", "longnet ms": "{seconds:ms}",
        "quartiles ms": "{seconds:quartiles ms}",
        **{f"{name} ms": f"{{beside[{name}]:ms}}" for name in _peers(result, "gigapath")},
        "torchscale / longnet": "{factor:.2f}", **_JUDGED,
    }  # fmt: skip
    note = (
        f"Forward, not causal, {_pattern(result['gigapath'][0]['case'])}. At lengths that segments do not divide torchscale "
        "attends to the zeros that it pads them with."
    )
    rows = _rows(result, "gigapath", verdicts.gigapath, factor=lambda record: factor(record, "torchscale"))
    return table("GigaPath's shape", columns, rows, note, *_peer_notes(result, "gigapath"))


def _growth(result: Record) -> Table:
    lengths, case = (result["growth"][0][name] for name in ("lengths", "case"))
    if on_gpu(result):
        columns = {"pass": "{pass}", **{f"N={n:,}": f"{{times[{n}]:.3f}}" for n in lengths}}
        title = "Growth: nanoseconds per token and head"
        notes = [f"H={case['heads']}, D={case['head_dim']}, causal, the same heads at every length."]
    else:
        columns = {"dtype": "{case[dtype]}", **{f"N={n}": f"{{times[{n}]:.2f}}" for n in lengths}}
        title, notes = "Growth: forward, microseconds per token", []
    columns |= {"largest over smallest, less 1": "{value:.1%}", **_SHARE}
    rows = _rows(result, "growth", verdicts.growth, times=partial(verdicts.per_token, result))
    return table(title, columns, rows, *notes)


def _longest(result: Record) -> Table:
    columns = {
        "H": "{case[heads]}", "D": "{case[head_dim]}", "pass": "{pass}", "longest N that fits": "{length:,}",
        "N that does not": "{fails_at:,}",
    }  # fmt: skip
    note = "One sequence, causal, q, k, v and all results held at once."
    return table("Longest sequence", columns, result["longest"], note)


def _reading(result: Record) -> Table:
    columns = {
        "tokens": "{read:,}", "cache MiB": "{cache_bytes:.1f MiB}",
        "tokens/s, first tenth": "{first:,.0f}", "tokens/s, last tenth": "{last:,.0f}",
        "peak MiB, first tenth": "{peak_bytes[0]:.0f MiB}", "peak MiB, second": "{peak_bytes[1]:.0f MiB}",
        "peak MiB, last": "{peak_bytes[9]:.0f MiB}", "last over second, less 1": "{value:.1%}", **_SHARE,
    }  # fmt: skip

    def speed(tenth: int) -> Callable[[Record], float]:
        return lambda record: record["read"] / len(record["seconds"]) / record["seconds"][tenth]

    record = result["stream"][0]
    note = (
        f"A model of 2 layers, 64 wide, {_pattern(record)}, reads random bytes {record['chunk']:,} at a time "
        "and gives logits for each. Resident memory of the whole process."
    )
    rows = _rows(result, "stream", verdicts.reading, first=speed(0), last=speed(-1))
    return table("Streaming", columns, rows, note)


def _prefix(result: Record) -> Table:
    columns = {
        "tokens": "{read:,}", "reading them s": "{total:.1f}", "clone() ms": "{kept[clone_seconds]:.1f ms}",
        "to a file ms": "{kept[save_seconds]:.1f ms}", "from the file ms": "{kept[load_seconds]:.1f ms}",
        "file MiB": "{kept[file_bytes]:.1f MiB}",
    }  # fmt: skip
    return table("A prefix kept", columns, _rows(result, "stream", total=lambda record: sum(record["seconds"])))


def _stream(result: Record) -> Table:
    rows: list[Record] = []
    notes = []

    def add(what: str, size: str, form: str, fields: Record, verdict: Verdict | None = None) -> None:
        judged = _judged(verdict)
        rows.append({"what": what, "size": size, "found": _fill(form, (), fields | judged), **judged})

    for record in result["stream"]:
        cache = f"{record['cache_bytes'] / 2**20:.1f}"
        if record["pass"] != "decode":
            what = f"N={record['case']['length']:,}, {record['pass']}"
            add(what, cache, "error {error:.2g}, allowed {allowed:.2g}", _worst(record["checks"]))
            continue
        first, last = record["positions"][0], record["positions"][-1]
        for position in record["positions"]:
            verdict = verdicts.position(result, record) if position == last else None
            took = {"seconds": record["seconds"][str(position)]}
            add(f"a token near position {position:,}", cache, "{seconds:.1f us} us", took, verdict)
        add(
            f"dense decoding, {record['dense_tokens']:,} tokens cached", f"{record['dense_bytes'] / 2**20:.0f}",
            "{dense:.1f us} us, {value:.2f} times ours", record["seconds"], verdicts.dense_decoding(result, record),
        )  # fmt: skip
        notes.append(
            f"A token's time by layer: a CUDA graph of {record['layers']} layers, {record['replays']} replays, medians of "
            f"{len(record['phases'])} phases of the pattern, the same ones after position {first:,} and {last:,}. A step reads "
            "the rows that its segments hold by then, so positions compare at the same phase."
        )
    columns = {"what": "{what}", "cache MiB": "{size}", "found": "{found}", **_JUDGED}
    return table("Streaming", columns, rows, *notes)


def _long_stream(result: Record) -> list[Table]:
    """Bits per byte by decade of position; time and memory against their limits."""
    whole, limits, slices = result["result"], result["limits"], result["slices"]
    bits = [one["bits_per_byte"] for one in slices if one["position"] <= result["text_bytes"]]
    quarter = len(bits) // 4
    memory = max(one["memory_peak"] for one in slices) / 2**30
    growth = whole["last_tenth"]["memory_peak"] / whole["first_tenth"]["memory_peak"] - 1
    judged = {
        name: _judged(Verdict(name, value, limits[name])) | {"limit": format(limits[name], form)}
        for name, value, form in (
            ("seconds", whole["seconds"], ""), ("memory_gib", memory, ""), ("growth", growth, ".0%"),
        )
    }  # fmt: skip
    rows = [
        ("tokens", f"{whole['position']:,}"),
        ("seconds", f"{whole['seconds']:.0f}", "seconds"),
        ("tokens/s", f"{whole['tokens_per_second']:,.0f}"),
        ("peak GPU memory GiB", f"{memory:.2f}", "memory_gib"),
        ("last tenth's peak over the first's, less 1", f"{growth:.1%}", "growth"),
        ("text at the start, bytes", f"{result['text_bytes']:,}"),
        ("bits per byte of its slices, mean", f"{fmean(bits):.3f}"),
        ("least and most", f"{min(bits):.3f} and {max(bits):.3f}"),
        ("first and last quarter", f"{fmean(bits[:quarter]):.3f} and {fmean(bits[-quarter:]):.3f}"),
        ("cache MiB", f"{result['stream']['cache_bytes'] / 2**20:.0f}"),
    ]
    found = [{"what": what, "found": shown, **judged.get("".join(name), {})} for what, shown, *name in rows]
    decades = {"position": "{first:,} to {last:,}", "bytes": "{bytes:,}", "bits per byte": "{bits_per_byte:.3f}"}
    columns = {"what": "{what}", "found": "{found}", "limit": "{limit}", "verdict": "{verdict}"}
    return [table("Bits per byte, by position", decades, whole["decades"]), table("A long stream", columns, found)]


# The memory of CUDA graphs belongs to no tensor.
ENCODER_MEMORY = {"longnet": "bytes", "longnet compiled": "reserved"}
_ENCODER_FIGURES = {
    "forward": ("forward ms", "forward"), "step": ("training step ms", "step"),
    "step_bytes": ("training memory GiB", "step"),
}  # fmt: skip


def _slide_encoder(result: Record) -> list[Table]:
    """The slide encoder on a GPU, by default and compiled, beside the original; on a CPU by itself."""
    rows: list[Record] = []
    for part in result["parts"].values():
        if "ratios" in part:
            rows += [_compared(part, what, name) for what in _ENCODER_FIGURES for name in ENCODER_MEMORY]
        elif "forward" in part:
            size, time = f"{part['forward']['bytes'] / 2**30:.1f} GiB", f"{part['forward']['median']:,.0f}"
            rows.append(part | {"what": "forward ms", "encoder": "eager", "here": time, "verdict": size})
    columns = {
        "tiles": "{tiles:,}", "what": "{what}", "the encoder": "{encoder}", "here": "{here:.1f}",
        "original": "{original:.1f}", "ratio": "{ratio:.3f}", "limit": "{limit:.3f}", "verdict": "{verdict}",
    }  # fmt: skip
    cpu_columns = {
        "tiles": "{tiles:,}", "dtype": "{dtype}", "forward s": "{seconds:.1f}",
        "resident GB": "{resident_peak_bytes:.1f GB}", "verdict": "{verdict}",
    }  # fmt: skip
    on_cpu = [part for part in result["parts"].values() if "seconds" in part]
    cpu_rows = [part | {"verdict": "reached" if part["reached"] else "missed"} for part in on_cpu]
    both = table("Slide encoder", columns, rows), table("Slide encoder on a CPU", cpu_columns, cpu_rows)
    return [one for one in both if one.rows]


def _compared(part: Record, what: str, name: str) -> Record:
    """A row: one figure of the encoder in one form beside the original's."""
    title, pass_of = _ENCODER_FIGURES[what]
    here, original = part[name][pass_of], part["gigapath"][pass_of]
    if what == "step_bytes":
        shown = {"here": here[ENCODER_MEMORY[name]] / 2**30, "original": original["bytes"] / 2**30}
    else:
        shown = {"here": here["median"], "original": original["median"]}
    verdict = Verdict(what, part["ratios"][name][what], part["limits"][what])
    row = {"tiles": part["tiles"], "what": title, "encoder": "compiled" if name == "longnet compiled" else "eager"}
    judged = {"ratio": verdict.value, "limit": verdict.limit, "verdict": str(verdict) if name == part["judged"] else ""}
    return row | shown | judged


def _compressed(result: Record) -> list[Table]:
    columns = {
        "model": "{name}", "file MB": "{file_bytes:.2f MB}", "weights MB": "{memory_bytes:.2f MB}",
        "forward ms": "{forward_seconds:.0f ms}", "tokens/s": "{speed:.0f}", "bits per byte": "{bits_per_byte:.4f}",
    }  # fmt: skip
    speed = lambda record: result["decoded"] / median(record["decode_seconds"])  # noqa: E731
    return [table("Compressed models", columns, _rows(result, "variants", speed=speed))]


def _scaling(result: Record) -> list[Table]:
    rows = []
    for one in result["patterns"]:
        for name, which in (("", "forward_backward"), (", forward", "forward")):
            alone, together = (median(one["seconds"][f"{what}{name}"]) for what in ("alone", "together"))
            limit = result["limit"] if one["even"] and not name else None
            verdict = None if limit is None else Verdict("ratio", together / alone, limit)
            times = {"pass": which, "alone": alone, "together": together, "ratio": together / alone}
            rows.append(one | times | {"most": max(one["bytes_sent"]) / 2**20} | _judged(verdict))
    columns = {
        "pattern": "{pattern}", "tokens a device": "{shard:,}", "pass": "{pass}", "one device ms": "{alone:.2f ms}",
        f"{result['ranks']} devices ms": "{together:.2f ms}", "ratio": "{ratio:.3f}", "pairs of the busiest": "{pairs:.2f}",
        "most sent MiB": "{most:,.1f}", **_JUDGED,
    }  # fmt: skip
    worst = {name: max(one["errors"][name] for one in result["patterns"]) for name in result["patterns"][0]["errors"]}
    return [table("Scaling", columns, rows, f"Largest errors against one device: {_errors(worst, '.1e')}.")]


def _shares(result: Record) -> list[Table]:
    rows = []
    for one in result["patterns"]:
        for name, which in (("", "forward_backward"), (", forward", "forward")):
            alone, slowest = (median(one["seconds"][f"{what}{name}"]) for what in ("alone", one["slowest"]))
            value = slowest / alone / one["pairs"]
            verdict = None if result["limit"] is None or name else Verdict("ratio", value, result["limit"])
            times = {"pass": which, "alone": alone, "slowest_seconds": slowest, "over_pairs": value}
            rows.append(one | times | _judged(verdict))
    columns = {
        "pattern": "{pattern}", "tokens a rank": "{shard:,}", "pass": "{pass}", "one device ms": "{alone:.2f ms}",
        f"slowest of {result['ranks']} ranks ms": "{slowest_seconds:.2f ms}", "pairs of the busiest": "{pairs:.2f}",
        "time over pairs": "{over_pairs:.3f}", **_JUDGED,
    }  # fmt: skip
    worst = {name: max(one["errors"][name] for one in result["patterns"]) for name in result["patterns"][0]["errors"]}
    checked = max(one["checked_tokens"] for one in result["patterns"])
    note = f"Largest errors against one device, of {checked:,} tokens in all: {_errors(worst, '.1e')}."
    return [table("Shares", columns, rows, note)]


def _encoders(result: Record) -> list[Table]:
    rows = [
        one[which]["seconds"]
        | {"encoder": one["encoder"], "tokens": one["case"]["length"], "pass": which}
        | {"pairs": one["pairs"], "value": one[which]["over_pairs"]}
        for one in result["rows"]
        for which in PASSES
    ]  # fmt: skip
    columns = {
        "encoder": "{encoder}", "tokens": "{tokens:,}", "pass": "{pass}", "longnet ms": "{ours:.3f ms}",
        "dense ms": "{dense:.3f ms}", "pairs of dense": "{pairs:.3f}", "time over pairs": "{value:.2f}",
    }  # fmt: skip
    return [table("Encoders", columns, rows)]


def _hf(result: Record) -> list[Table]:
    times, (low, _, high) = result["seconds"], result["quartiles"]
    rows = [{"step": name, "seconds": x, "ratio": median(x) / median(times["plain"])} for name, x in times.items()]
    notes = (
        f"A step of {result['tokens']:,} tokens. Quartiles of pairs {low:.3f} to {high:.3f}; limit {result['limit']}: "
        f"{Verdict('ratio', result['ratio'], result['limit'])}.",
        f"Relative differences: {_errors(result['errors'], '.1e')}.",
    )
    return [table("Hugging Face", {"step": "{step}", "ms": "{seconds:.2f ms}", "ratio": "{ratio:.3f}"}, rows, *notes)]


def _longest_training(result: Record) -> list[Table]:
    columns = {
        "devices": "{ranks}", "tokens": "{tokens:,}", "seconds a step": "{seconds:.2f}", "tokens/s": "{speed:,.0f}",
        "GiB a device": "{gib:.1f}",
    }  # fmt: skip
    rows = []
    for one in result["tried"]:
        figures = {"speed": one["tokens"] / one["seconds"]} if one["fits"] else {"seconds": "out of memory"}
        rows.append(one | {"ranks": result["ranks"]} | figures)
    return [table("Longest training", columns, rows)]


def _training_ranks(result: Record) -> list[Table]:
    def verdict(value: float) -> Record:
        return _judged(Verdict("difference", value, result["limit"]))

    # One process that takes windows in turn shows what rounding does: nothing is promised of it.
    rows = [
        {"accumulate": 1} | one | (_judged(None) if one.get("accumulate", 1) > 1 else verdict(one["difference"]))
        for one in result["runs"]
    ]
    columns = {
        "processes": "{processes}", "--cp": "{cp}", "--accumulate": "{accumulate}", "tokens/s": "{tokens_per_second:,.0f}",
        "first step s": "{first_seconds:.1f}", "largest difference of a loss": "{difference:.1e}", **_JUDGED,
    }  # fmt: skip
    tables = [table("Training over processes", columns, rows, f"{result['steps']} steps each.")]
    if (killed := result["killed"]) is not None:
        columns = {
            "killed at step": "{killed_at}", "saved step": "{saved}", "the others ended after s": "{ended_after:.1f}",
            "resumed by": "{resumed_by}", "largest difference of a loss": "{difference:.1e}", **_JUDGED,
        }  # fmt: skip
        tables.append(table("A process is killed", columns, [killed | verdict(killed["difference"])]))
    return tables


_CPU_TABLES = (
    ("checks", _checks), ("noise", _noise), ("speed", _cpu_speed), ("memory", _cpu_memory), ("import", _import),
    ("growth", _growth), ("stream", _reading), ("stream", _prefix),
)  # fmt: skip
_GPU_TABLES = (
    ("checks", _checks), ("ceilings", _ceilings), ("speed", _gpu_speed), ("memory", _gpu_memory),
    ("gigapath", _gigapath), ("growth", _growth), ("longest", _longest), ("stream", _stream),
)  # fmt: skip


def _windows(result: Record) -> list[Table]:
    from benchmarks.cases import Case
    from benchmarks.windows import Row

    def name(kind: Record) -> str:
        if (
            not kind.get("segment_lengths") and kind.get("segment_lengths") is not None
        ) or "segment_lengths" not in kind:
            return f"window {kind['window']:,}"
        if kind["segment_lengths"] is None:
            blocks = f", blocks of {kind['dilation_block']}" * (kind["dilation_block"] > 1)
            return f"stride {kind['dilation_rates']}{blocks}, window {kind['window']:,}"
        if "window" in kind:
            return f"LongNet, window {kind['window']:,}"
        rows = isinstance(kind["segment_offset"], list)
        return "LongNet, an offset for each row" if rows else f"LongNet, offset {kind['segment_offset']:,}"

    rows = []
    for record in result["rows"]:
        tiles = Row(Case(**record["case"]), record["kind"], record["beside"]).tile_share
        for which, one in record["passes"].items():
            verdict = Verdict(name(record["kind"]), one["ratio"], one["limit"])
            by_tiles = tiles and one["ratio"] * record["pairs"] / tiles
            row = {
                "what": name(record["kind"]),
                "case": record["case"],
                "pass": which,
                "beside": _BESIDE[record["beside"]],
            }
            rows.append(row | one | {"by_tiles": by_tiles, "verdict": str(verdict)})
    columns = {
        "what": "{what}", "N": "{case[length]:,}", "D": "{case[head_dim]}", "pass": "{pass}", "longnet ms": "{seconds[ours]:ms}",
        "beside": "{beside}", "its ms": "{seconds[other]:ms}", "time over pairs": "{ratio:.3f}", "over tiles": "{by_tiles:.3f}",
        **_JUDGED,
    }  # fmt: skip
    made = [table("Windows and strides", columns, rows)]
    if result.get("host"):
        host = [record | {"verdict": str(Verdict("", record["value"], record["limit"]))} for record in result["host"]]
        columns = {
            "call": "{kind}", "pass": "{pass}", "host us": "{seconds:us}", "over LongNet's": "{value:.3f}", **_JUDGED
        }  # fmt: skip
        made.append(table("Host time of a call", columns, host))
    return made


_BESIDE = {
    "flex": "FlexAttention", "dense": "dense cuDNN", "longnet": "LongNet alone", "grid": "LongNet alone",
    "grids": "LongNet alone",
}  # fmt: skip


def _decoding(result: Record) -> list[Table]:
    rows = []
    for record in result["rows"]:
        share, limits = record["bytes"] / record["dense_bytes"], record["limits"]
        judged = record["case"]["batch"] > 1
        verdict = Verdict("", record["ratio"], limits["seconds"], judged)
        rows.append(record | {"share": share, "limit": limits["seconds"] if judged else None, "verdict": str(verdict)})
    columns = {
        "batch": "{case[batch]}", "heads": "{case[heads]}", "key/value heads": "{case[kv_heads]}", "D": "{case[head_dim]}",
        "longnet us": "{seconds[ours]:us}", "dense us": "{seconds[dense]:us}", "ratio": "{ratio:.3f}", **_JUDGED,
        "cache bytes over dense's": "{share:.3f}",
    }  # fmt: skip
    return [table("Decoding", columns, rows)]


def _waiting(result: Record) -> list[Table]:
    rows = []
    for record in result["rows"]:
        others = {name: seconds for name, seconds in record["seconds"].items() if name != "ours"}
        beside = ", ".join(f"{name} {1e3 * median(seconds):.3g} ms" for name, seconds in others.items()) or None
        value = record["value"] if record["beside"] else 1e3 * record["value"]
        limit = record["limit"] if record["beside"] or record["limit"] is None else 1e3 * record["limit"]
        of = f" of {record['beside']}" if record["beside"] else " ms"
        shown = None if limit is None else f"{limit:.4g}{of}"
        verdict = Verdict("", value, limit, limit is not None)
        rows.append(record | {"others": beside, "limit": shown, "verdict": str(verdict) if limit is not None else None})
    columns = {
        "what": "{name}", "longnet ms": "{seconds[ours]:ms}", "beside": "{others}", "tokens/s": "{tokens_per_second:,.0f}",
        "first call s": "{first_seconds:.1f}", "limit": "{limit}", "verdict": "{verdict}",
    }  # fmt: skip
    return [table("Waiting", columns, rows)]


def _generation(result: Record) -> list[Table]:
    # "dense" alone would be cuDNN's, as in other tables.
    names = {"dense": "dense, no tricks"}
    rows = [
        record | {"mib": record["cache_bytes"] / 2**20, "name": names.get(record["stack"], record["stack"])}
        for record in result["rows"]
    ]
    columns = {
        "stack": "{name}", "bytes of the prompt": "{prompt:,}", "cache MiB": "{mib:,.1f}", "first token ms": "{first:ms}",
        "ms a token": "{token:ms}",
    }  # fmt: skip
    return [table("Generation", columns, rows)]


_KINDS: dict[str, Callable[[Record], list[Table]]] = {
    "stream record": _long_stream, "gigapath": _slide_encoder, "compress": _compressed, "scaling": _scaling, "hf": _hf,
    "shares": _shares, "encoders": _encoders, "generation": _generation,
    "longest training": _longest_training, "windows": _windows, "decoding": _decoding,
    "waiting": _waiting, "training over ranks": _training_ranks,
}  # fmt: skip
