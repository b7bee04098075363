"""Every kind of result as tables: what is printed and what stands in the documents is computed from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean, median

from benchmarks import verdicts
from benchmarks.cases import Record
from benchmarks.table import Row, Table, table
from benchmarks.timing import quartiles
from benchmarks.verdicts import Verdict, factor, on_gpu, pass_name

Cells = dict[str, str]
_NONE, _MIB, _GIB = "-", 2**20, 2**30
_REFERENCES = {"same_flop": "same-FLOP kernel", "dense": "dense cuDNN"}
_CHECKED = ("noise", "speed", "memory", "gigapath", "growth", "longest", "stream")


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
        size = f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / _GIB:.0f} GiB"
        return f"{sha}, {result['date']}; {listed}; {device['model']} ({size})"
    return (
        f"{sha}, {result['date']}; longnet {versions['longnet']}, torch {versions['torch']}, "
        f"Python {versions['python']}; {device['model']} ({device['capability']}), {device['threads']} threads on "
        f"{device['cores']} cores"
    )


def tables(result: Record) -> list[Table]:
    """Every section that the run covered."""
    if "kind" in result:
        return list(_KINDS.get(result["kind"], lambda result: [])(result))
    makers: dict[str, Callable[[Record], Table]] = {
        "checks": _checks,
        "noise": _noise,
        "ceilings": _ceilings,
        "speed": _speed,
        "memory": _memory,
        "import": _import,
        "gigapath": _gigapath,
        "growth": _growth,
        "longest": _longest,
        "stream": _stream if on_gpu(result) else _reading,
    }
    made = [make(result) for section, make in makers.items() if result.get(section)]
    if not on_gpu(result) and result.get("stream"):
        made.append(_prefix(result))
    if result.get("memory_why_not"):
        made.append(Table("Memory", ("not measured",), ((result["memory_why_not"],),)))
    return made


def summary(result: Record) -> Iterator[str]:
    """Reached or missed, plainly."""
    if "kind" not in result:
        yield from verdicts.summary(result)
        return
    judged = [table for table in tables(result) if "verdict" in table.columns]
    for one in judged:
        said = [(row[0], row[one.columns.index("verdict")]) for row in one.rows]
        missed = [f"missed: {name}" for name, verdict in said if verdict == "missed"]
        yield from missed or ["all limits reached"] * any(verdict == "reached" for _, verdict in said)


def markdown(result: Record) -> str:
    """Everything that was measured, for a page."""
    parts = [header(result)]
    for one in tables(result):
        parts += [f"**{one.title}**", one.markdown(), *one.notes]
    return "\n\n".join([*parts, *summary(result)])


def plain(result: Record) -> str:
    """Everything that was measured, for a terminal or a log."""
    return "\n\n".join([header(result), *(one.plain() for one in tables(result)), "\n".join(summary(result))])


def judged_ratio(ratio: float, limit: float) -> str:
    return "reached" if ratio <= limit else "missed"


def _verdict(verdict: Verdict | None, form: str = ".4g", prefix: str = "") -> Cells:
    shown = (_NONE, _NONE) if verdict is None else (format(verdict.limit, form), str(verdict))
    return dict(zip((f"{prefix}limit", f"{prefix}verdict"), shown, strict=True))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _tenths(seconds: Iterable[float]) -> str:
    return f"{median(seconds) * 1e3:.1f}"


def _causal(record: Record) -> str:
    return "yes" if record["case"]["is_causal"] else "no"


def _cell(result: Record, record: Record) -> Cells:
    """The first columns of a table of cells."""
    case = record["case"]
    if not on_gpu(result):
        return {"N": str(case["length"]), "dtype": case["dtype"], "pass": pass_name(record)}
    cells = {"N": f"{case['length']:,}", "D": str(case["head_dim"]), "causal": _causal(record)}
    return cells | {"pass": pass_name(record)}


def _where(record: Record) -> str:
    case = record["case"]
    return f"N={case['length']} D={case['head_dim']} causal {_causal(record)} {pass_name(record)}"


def _peers(result: Record, section: str | None = None) -> list[str]:
    """Other implementations that were loaded, in a section: that it has a figure of."""
    names = [peer["name"] for peer in result["peers"] if peer["why_not"] is None]
    return [name for name in names if section is None or any(name in one["beside"] for one in result[section])]


def _pattern(record: Record) -> str:
    lists = (", ".join(map(str, record[name])) for name in ("segment_lengths", "dilation_rates"))
    return f"segments {' at rates '.join(lists)}"


def _checks(result: Record) -> Table:
    every = list(result["checks"])
    for section in _CHECKED:
        every += [check for record in result.get(section) or () for check in record.get("checks", ())]
    worst = max(every, key=lambda check: check["error"] / check["allowed"])
    cells = {"checks": str(len(every)), "nearest to its limit": worst["what"], "error": f"{worst['error']:.2g}"}
    return table("Checks against the float64 definition, all passed", [cells | {"allowed": f"{worst['allowed']:.2g}"}])


def _noise(result: Record) -> Table:
    def row(record: Record) -> Cells:
        first, second = record["seconds"]["first"], record["seconds"]["second"]
        both = first + second
        return {
            "N": str(record["case"]["length"]), "dtype": record["case"]["dtype"],
            "runs": f"{len(first)} + {len(second)}", "median ms": _tenths(both),
            "ratio of its two medians": f"{median(second) / median(first):.3f}",
            "(max - min) / median": f"{(max(both) - min(both)) / median(both):.1%}",
        }  # fmt: skip

    return table("Noise: one and the same forward timed as two", map(row, result["noise"]))


def _ceilings(result: Record) -> Table:
    ceilings = result["ceilings"]
    flops, size = (
        ceilings[f"{name}_{unit}"] / median(ceilings["seconds"][name]) / 1e12
        for name, unit in (("matrix", "flops"), ("copy", "bytes"))
    )
    name = f"bf16 matrix product, {ceilings['matrix_side']} cubed, TFLOP/s"
    cells = {name: f"{flops:.0f}", "copy, read plus written, TB/s": f"{size:.2f}"}
    return table("Ceilings, measured in the same run", [cells])


def _speed(result: Record) -> Table:
    make, notes = (_gpu_speed, _gpu_notes) if on_gpu(result) else (_cpu_speed, _cpu_notes)
    rows = [_cell(result, record) | make(result, record) for record in result["speed"]]
    others = {f"{name} {what}" for name in _peers(result) for what in ("ms", "/ longnet") if name != "torchscale"}
    left_out = {"quartiles of pairs", "quartiles ms", "ratio in (B, N, H, D) memory", *others}
    if not on_gpu(result):
        left_out.add("torchscale ms")
    return table("Speed", rows, notes(result), tuple(name for name in rows[0] if name not in left_out))


def _pairs(record: Record) -> str:
    both = zip(record["judged"]["ours"], record["judged"][record["reference"]], strict=True)
    low, _, high = quartiles([one / other / record["ratio"] for one, other in both])
    return f"{low:.3f} to {high:.3f}"


def _cpu_speed(result: Record, record: Record) -> Cells:
    beside = record["beside"]
    tokens_first = median(beside["ours_tokens_first"]) / median(beside["same_flop"]) / record["ratio"]
    others = {"dense SDPA ms": "dense", **{f"{name} ms": name for name in _peers(result)}}
    return {
        "same-FLOP kernel ms": f"{verdicts.reference_seconds(record) * 1e3:.1f}",
        "longnet ms": _tenths(record["judged"]["ours"]),
        "ratio": f"{verdicts.against_reference(record):.3f}", "quartiles of pairs": _pairs(record),
        **_verdict(verdicts.speed(result, record)),
        "ratio in (B, N, H, D) memory": f"{tokens_first:.3f}",
        **{title: _tenths(beside[name]) if name in beside else _NONE for title, name in others.items()},
    }  # fmt: skip


def _cpu_notes(result: Record) -> Iterator[str]:
    factors = ", ".join(sorted({f"{record['ratio']:g}" for record in result["speed"]}))
    yield f"Same-FLOP kernel: torch's own on dense blocks, its median times the ratio of score FLOPs ({factors})."
    for record in result["speed"]:
        for name, reason in record["left_out"].items():
            yield f"{name} left out at {verdicts.place(result, record)}: {reason}."
    for peer in result["peers"]:
        if peer["why_not"]:
            yield f"{peer['name']} not timed: {peer['why_not']}."
        else:
            errors = ", ".join(f"{name} {error:.2g}" for name, error in peer["errors"].items())
            yield f"{peer['name']} with torch's CPU flash kernel lent to it; relative errors in float32: {errors}."


def _gpu_speed(result: Record, record: Record) -> Cells:
    ours = record["judged"]["ours"]
    low, _, high = quartiles(ours)
    cells = {
        "longnet ms": _ms(median(ours)), "quartiles ms": f"{_ms(low)} to {_ms(high)}",
        "against": _REFERENCES[record["reference"]], "its ms": _ms(verdicts.reference_seconds(record)),
        "ratio": f"{verdicts.against_reference(record):.3f}", "quartiles of pairs": _pairs(record),
        **_verdict(verdicts.speed(result, record)), "visited": f"{record['visited']:.0%}",
    }  # fmt: skip
    for name in _peers(result):
        value = factor(record, name)
        cells[f"{name} ms"] = _NONE if value is None else _ms(median(record["beside"][name]))
        cells[f"{name} / longnet"] = _NONE if value is None else f"{value:.2f}"
        if name == "torchscale":
            cells |= _verdict(verdicts.torchscale(result, record), prefix="torchscale ")
    return cells


def _gpu_notes(result: Record) -> Iterator[str]:
    ratios = sorted({record["ratio"] for record in result["speed"] if record["reference"] == "same_flop"})
    yield (
        "Same-FLOP kernel: cuDNN attention on dense blocks of random data, its time multiplied by the exact ratio of score "
        f"pairs ({', '.join(f'{ratio:g}' for ratio in ratios)}); the ratio to it is the tax. Dense cuDNN: over the whole "
        "sequence, another function. Visited: score pairs that these kernels compute, as a share of the pattern's, since a "
        "key that several branches share is computed once with a weight. So the ratio is no measure of how well the "
        "hardware is used."
    )
    for record in result["speed"]:
        if "wall" in record:
            yield (
                f"{_where(record)}, calls back to back by the host's clock: longnet {_ms(record['wall']['ours'])} ms, "
                f"{_REFERENCES[record['reference']]} {_ms(record['wall'][record['reference']])} ms (not scaled)."
            )
    yield from _peer_notes(result, "speed")


def _peer_notes(result: Record, section: str) -> Iterator[str]:
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
                reasons.setdefault(record["left_out"][peer["name"]], []).append(_where(record))
        for reason, places in reasons.items():
            yield f"{peer['name']} left out at {'; '.join(places)}: {reason}."


def _memory(result: Record) -> Table:
    if on_gpu(result):
        return _gpu_memory(result)

    def row(record: Record) -> Cells:
        output, peak = record["output_bytes"], median(record["peak_bytes"])
        verdict = verdicts.memory(result, record)
        return {
            **_cell(result, record),
            "output MiB": f"{output / _MIB:.1f}", "peak beyond the inputs MiB": f"{peak / _MIB:.1f}",
            "in outputs": f"{verdict.value:.2f}", **_verdict(verdict),
            "live alone, in outputs": f"{record['live_peak_bytes'] / output:.2f}",
            "with the given gradient, in outputs": f"{(peak + record['grad_out_bytes']) / output:.2f}",
        }  # fmt: skip

    note = (
        "Resident memory at its peak (VmHWM, Linux), the result included, median of fresh processes. Inputs are q, k, v "
        "and, for fwd+bwd, the gradient given for out; the last column counts that gradient too. Live alone: one more "
        "process, with a malloc that keeps little of what is freed."
    )
    brief = ("N", "dtype", "pass", "in outputs", "limit", "verdict")
    return table("Memory", map(row, result["memory"]), (note,), brief)


def _gpu_memory(result: Record) -> Table:
    peers = _peers(result, "memory")

    def row(record: Record) -> Cells:
        verdict = verdicts.memory(result, record)
        sizes = {name: record["beside"].get(name) for name in peers}
        return {
            **_cell(result, record), "output GiB": f"{record['output_bytes'] / _GIB:.3g}",
            "beyond q, k, v GiB": f"{verdict.value:.2f}", **_verdict(verdict),
            **{f"{x} GiB": "out of memory" if size is None else f"{size / _GIB:.1f}" for x, size in sizes.items()},
        }  # fmt: skip

    note = (
        "Most bytes that torch's allocator held at once, the output and, for fwd+bwd, the gradient given for it, three "
        "gradients and statistics included."
    )
    return table("Memory", map(row, result["memory"]), (note,))


def _import(result: Record) -> Table:
    times, verdict = result["import"], verdicts.import_time(result)
    cells = {
        "processes": str(len(times["longnet_seconds"])),
        "import torch s": f"{median(times['torch_seconds']):.2f}",
        "import longnet beyond it s": f"{verdict.value:.3f}",
    }
    return table("Import", [cells | _verdict(verdict)])


def _gigapath(result: Record) -> Table:
    peers = _peers(result, "gigapath")

    def row(record: Record) -> Cells:
        case, beside, (low, middle, high) = record["case"], record["beside"], quartiles(record["seconds"])
        value = factor(record, "torchscale")
        return {
            "N": f"{case['length']:,}", "D": str(case["head_dim"]), "dtype": case["dtype"],
            "longnet ms": _ms(middle), "quartiles ms": f"{_ms(low)} to {_ms(high)}",
            **{f"{name} ms": _ms(median(beside[name])) if name in beside else _NONE for name in peers},
            "torchscale / longnet": _NONE if value is None else f"{value:.2f}",
            **_verdict(verdicts.gigapath(result, record)),
        }  # fmt: skip

    note = (
        f"Forward, not causal, {_pattern(result['gigapath'][0]['case'])}. At lengths that segments do not divide torchscale "
        "attends to the zeros that it pads them with."
    )
    notes = (note, *_peer_notes(result, "gigapath"))
    return table("GigaPath's shape", map(row, result["gigapath"]), notes)


def _growth(result: Record) -> Table:
    gpu, case = on_gpu(result), result["growth"][0]["case"]

    def row(record: Record) -> Cells:
        verdict = verdicts.growth(result, record)
        times = verdicts.per_token(result, record).items()
        return {
            **({"pass": pass_name(record)} if gpu else {"dtype": record["case"]["dtype"]}),
            **({f"N={n:,}": f"{x:.3f}" for n, x in times} if gpu else {f"N={n}": f"{x:.2f}" for n, x in times}),
            "largest over smallest, less 1": f"{verdict.value:.1%}",
            **_verdict(verdict, ".0%"),
        }

    rows = map(row, result["growth"])
    if not gpu:
        return table("Growth: forward, microseconds per token", rows)
    note = f"H={case['heads']}, D={case['head_dim']}, causal, the same heads at every length."
    return table("Growth: nanoseconds per token and head", rows, (note,))


def _longest(result: Record) -> Table:
    def row(record: Record) -> Cells:
        return {
            "H": str(record["case"]["heads"]), "D": str(record["case"]["head_dim"]), "pass": pass_name(record),
            "longest N that fits": f"{record['length']:,}",
            "N that does not": _NONE if record["fails_at"] is None else f"{record['fails_at']:,}",
        }  # fmt: skip

    note = "One sequence, causal, q, k, v and all results held at once."
    return table("Longest sequence", map(row, result["longest"]), (note,))


def _reading(result: Record) -> Table:
    def row(record: Record) -> Cells:
        verdict, peaks = verdicts.reading(result, record), [f"{peak / _MIB:.0f}" for peak in record["peak_bytes"]]
        speeds = [f"{record['read'] / len(peaks) / seconds:,.0f}" for seconds in record["seconds"]]
        return {
            "tokens": f"{record['read']:,}", "cache MiB": f"{record['cache_bytes'] / _MIB:.1f}",
            "tokens/s, first tenth": speeds[0], "tokens/s, last tenth": speeds[-1],
            "peak MiB, first tenth": peaks[0], "peak MiB, second": peaks[1], "peak MiB, last": peaks[-1],
            "last over second, less 1": f"{verdict.value:.1%}", **_verdict(verdict, ".0%"),
        }  # fmt: skip

    record = result["stream"][0]
    note = (
        f"A model of 2 layers, 64 wide, {_pattern(record)}, reads random bytes {record['chunk']:,} at a time "
        "and gives logits for each. Resident memory of the whole process."
    )
    return table("Streaming", map(row, result["stream"]), (note,))


def _prefix(result: Record) -> Table:
    def row(record: Record) -> Cells:
        cache = record["kept"]
        clone, save, load = (f"{cache[f'{name}_seconds'] * 1e3:.1f}" for name in ("clone", "save", "load"))
        return {
            "tokens": f"{record['read']:,}", "reading them s": f"{sum(record['seconds']):.1f}", "clone() ms": clone,
            "to a file ms": save, "from the file ms": load, "file MiB": f"{cache['file_bytes'] / _MIB:.1f}",
        }  # fmt: skip

    return table("A prefix kept", map(row, result["stream"]))


def _stream(result: Record) -> Table:
    rows: list[Cells] = []
    notes = []

    def add(what: str, size: str, figure: str, verdict: Verdict | None = None) -> None:
        rows.append({"what": what, "cache MiB": size, "found": figure, **_verdict(verdict)})

    for record in result["stream"]:
        cache = f"{record['cache_bytes'] / _MIB:.1f}"
        if record["pass"] != "decode":
            worst = max(record["checks"], key=lambda check: check["error"] / check["allowed"])
            figure = f"error {worst['error']:.2g}, allowed {worst['allowed']:.2g}"
            add(f"N={record['case']['length']:,}, {record['pass']}", cache, figure)
            continue
        first, last = record["positions"][0], record["positions"][-1]
        times = {name: f"{median(seconds) * 1e6:.1f} us" for name, seconds in record["seconds"].items()}
        for position in record["positions"]:
            verdict = verdicts.position(result, record) if position == last else None
            add(f"a token near position {position:,}", cache, times[str(position)], verdict)
        dense = verdicts.dense_decoding(result, record)
        what = f"dense decoding, {record['dense_tokens']:,} tokens cached"
        figure = f"{times['dense']}, {dense.value:.2f} times ours"
        add(what, f"{record['dense_bytes'] / _MIB:.0f}", figure, dense)
        notes.append(
            f"A token's time by layer: a CUDA graph of {record['layers']} layers, {record['replays']} replays, medians of "
            f"{len(record['phases'])} phases of the pattern, the same ones after position {first:,} and {last:,}. A step reads "
            "the rows that its segments hold by then, so positions compare at the same phase."
        )
    return table("Streaming", rows, notes)


def _long_stream(result: Record) -> list[Table]:
    """Bits per byte by decade of position; time and memory against their limits."""
    whole, limits, slices = result["result"], result["limits"], result["slices"]
    bits = [one["bits_per_byte"] for one in slices if one["position"] <= result["text_bytes"]]
    quarter = len(bits) // 4
    memory = max(one["memory_peak"] for one in slices) / _GIB
    growth = whole["last_tenth"]["memory_peak"] / whole["first_tenth"]["memory_peak"] - 1
    rows: list[Cells] = []

    def add(what: str, shown: str, value: float = 0.0, limit: str = "", form: str = "") -> None:
        verdict = Verdict(what, value, limits[limit]) if limit else None
        rows.append({"what": what, "found": shown, **_verdict(verdict, form)})

    add("tokens", f"{whole['position']:,}")
    add("seconds", f"{whole['seconds']:.0f}", whole["seconds"], "seconds")
    add("tokens/s", f"{whole['tokens_per_second']:,.0f}")
    add("peak GPU memory GiB", f"{memory:.2f}", memory, "memory_gib")
    add("last tenth's peak over the first's, less 1", f"{growth:.1%}", growth, "growth", ".0%")
    add("text at the start, bytes", f"{result['text_bytes']:,}")
    add("bits per byte of its slices, mean", f"{fmean(bits):.3f}")
    add("least and most", f"{min(bits):.3f} and {max(bits):.3f}")
    add("first and last quarter", f"{fmean(bits[:quarter]):.3f} and {fmean(bits[-quarter:]):.3f}")
    add("cache MiB", f"{result['stream']['cache_bytes'] / _MIB:.0f}")
    decades = (
        (f"{one['first']:,} to {one['last']:,}", f"{one['bytes']:,}", f"{one['bits_per_byte']:.3f}")
        for one in whole["decades"]
    )
    columns: Row = ("position", "bytes", "bits per byte")
    return [Table("Bits per byte, by position", columns, tuple(decades)), table("A long stream", rows)]


# The memory of CUDA graphs belongs to no tensor.
ENCODER_MEMORY = {"longnet": "bytes", "longnet compiled": "reserved"}
_ENCODERS = {"longnet": "eager", "longnet compiled": "compiled"}
_ENCODER_PARTS = {
    "forward": ("forward ms", "forward", "median", 1.0),
    "step": ("training step ms", "step", "median", 1.0),
    "step_bytes": ("training memory GiB", "step", "bytes", _GIB),
}


def _slide_encoder(result: Record) -> list[Table]:
    """The slide encoder on a GPU, by default and compiled, beside the original."""
    rows: list[Cells] = []
    columns = ("tiles", "what", "the encoder", "here", "original", "ratio", "limit", "verdict")

    def add(measured: Record, *cells: str) -> None:
        rows.append(dict(zip(columns, (f"{measured['tiles']:,}", *cells), strict=True)))

    def compare(measured: Record, what: str, name: str) -> None:
        title, pass_of, field, unit = _ENCODER_PARTS[what]
        one, other = (measured[encoder][pass_of] for encoder in (name, "gigapath"))
        own = ENCODER_MEMORY[name] if field == "bytes" else field
        # Results of before there were graphs have the memory of tensors alone.
        times = (one.get(own, one[field]) / unit, other[field] / unit)
        ratio, limit = measured["ratios"][name][what], measured["limits"][what]
        verdict = judged_ratio(ratio, limit) if name == measured["judged"] else ""
        cells = (*(f"{x:.1f}" for x in times), f"{ratio:.3f}", f"{limit:.3f}", verdict)
        add(measured, title, _ENCODERS[name], *cells)

    for measured in result["parts"].values():
        if "ratios" in measured:
            for what in _ENCODER_PARTS:
                for name in _ENCODERS:
                    compare(measured, what, name)
        elif "forward" in measured:
            milliseconds, size = measured["forward"]["median"], measured["forward"]["bytes"] / _GIB
            add(measured, "forward ms", "eager", f"{milliseconds:,.0f}", *("-",) * 3, f"{size:.1f} GiB")
    on_cpu = [_encoder_on_cpu(measured) for measured in result["parts"].values() if "seconds" in measured]
    both = {"Slide encoder": rows, "Slide encoder on a CPU": on_cpu}
    return [table(title, cells) for title, cells in both.items() if cells]


def _encoder_on_cpu(measured: Record) -> Cells:
    memory = f"{measured['resident_peak_bytes'] / 1e9:.1f}"
    cells = {"tiles": f"{measured['tiles']:,}", "dtype": measured["dtype"], "forward s": f"{measured['seconds']:.1f}"}
    return cells | {"resident GB": memory, "verdict": "reached" if measured["reached"] else "missed"}


def _compressed(result: Record) -> list[Table]:
    def row(record: Record) -> Cells:
        return {
            "model": record["name"],
            "file MB": f"{record['file_bytes'] / 1e6:.2f}", "weights MB": f"{record['memory_bytes'] / 1e6:.2f}",
            "forward ms": f"{median(record['forward_seconds']) * 1e3:.0f}",
            "tokens/s": f"{result['decoded'] / median(record['decode_seconds']):.0f}",
            "bits per byte": f"{record['bits_per_byte']:.4f}",
        }  # fmt: skip

    return [table("Compressed models", map(row, result["variants"]))]


def _scaling(result: Record) -> list[Table]:
    def row(name: str) -> Cells:
        alone, together = (median(result["seconds"][f"{one}{name}"]) for one in ("alone", "together"))
        cells = {"pass": "forward" if name else "fwd+bwd", "one device ms": f"{alone * 1e3:.2f}"}
        cells |= {f"{result['ranks']} devices ms": f"{together * 1e3:.2f}", "ratio": f"{together / alone:.3f}"}
        limit = None if name else result["limit"]
        return cells | _verdict(None if limit is None else Verdict("ratio", together / alone, limit))

    errors = ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items())
    return [table("Scaling", map(row, ("", ", forward")), (f"Largest errors against one device: {errors}.",))]


def _hf(result: Record) -> list[Table]:
    times = {name: median(seconds) for name, seconds in result["seconds"].items()}
    rows = [{"step": name, "ms": f"{x * 1e3:.2f}", "ratio": f"{x / times['plain']:.3f}"} for name, x in times.items()]
    (low, _, high), errors = result["quartiles"], result["errors"]
    notes = (
        f"A step of {result['tokens']:,} tokens. Quartiles of pairs {low:.3f} to {high:.3f}; limit {result['limit']}: "
        f"{judged_ratio(result['ratio'], result['limit'])}.",
        f"Relative differences: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())}.",
    )
    return [table("Hugging Face", rows, notes)]


def _longest_training(result: Record) -> list[Table]:
    def row(one: Record) -> Cells:
        cells = {"devices": str(result["ranks"]), "tokens": f"{one['tokens']:,}"}
        if not one["fits"]:
            return cells | {"seconds a step": "out of memory", "tokens/s": _NONE, "GiB a device": _NONE}
        seconds, speed = one["seconds"], one["tokens"] / one["seconds"]
        return cells | {
            "seconds a step": f"{seconds:.2f}",
            "tokens/s": f"{speed:,.0f}",
            "GiB a device": f"{one['gib']:.1f}",
        }

    return [table("Longest training", map(row, result["tried"]))]


_KINDS: dict[str, Callable[[Record], list[Table]]] = {
    "stream record": _long_stream,
    "gigapath": _slide_encoder,
    "compress": _compressed,
    "scaling": _scaling,
    "hf": _hf,
    "longest training": _longest_training,
}
