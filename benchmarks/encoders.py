"""Attention of encoders that others have published with torchscale, beside dense attention over the same tokens.

    python -m benchmarks.encoders --out encoders.json

Of each the time of a call, forward and with backward, and its time over dense attention's divided by its share of dense
attention's query-key pairs: 1 is as fast a pair as dense attention has. Results are compared with the definition first. The
lengths are of slides and of spots of a tissue, which no segment divides.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import report, results
from benchmarks.cases import PASSES, Case, Record
from benchmarks.cases import draw as draw_case
from benchmarks.device import Device, here
from benchmarks.timing import bare_dense, contender, interleave
from benchmarks.windows import ROUNDS, Row, attend, check

SLIDES = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
TORCHSCALE = ((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16))
SPOTS = ((1000, 2000, 3000, 5000), (1, 2, 3, 4))
# Heads, channels of each, the pattern, tokens.
ENCODERS: dict[str, tuple[int, int, tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]] = {
    "Prov-GigaPath, 768 wide": (16, 48, SLIDES, (10_001, 45_681)),
    "SlideChat, 512 wide, Prov-GigaPath's segments": (16, 32, SLIDES, (10_001, 45_681)),
    "SlideChat, 512 wide, torchscale's segments": (16, 32, TORCHSCALE, (10_001, 45_681)),
    "DiSCoTME, 256 wide, rates 1, 2, 3, 4": (8, 32, SPOTS, (4_987, 45_681)),
}


def measure(name: str, case: Case, device: Device, rounds: int) -> Record:
    kind = {"segment_lengths": case.segment_lengths, "dilation_rates": case.dilation_rates}
    row = Row(case, kind, "dense")
    tensors = draw_case(case, 0, device.device)
    record: Record = {"encoder": name, "case": case.to_dict(), "pairs": row.share, "error": check(row, device)}
    calls = (contender("ours", attend(row, device.device), tensors), bare_dense(device, tensors, False, "dense"))
    for which in PASSES:
        seconds = interleave(device, {one.name: one.passes[which] for one in calls}, rounds, rounds)
        value = median(a / b for a, b in zip(seconds["ours"], seconds["dense"], strict=True)) / row.share
        record[which] = {"seconds": seconds, "over_pairs": value}
    device.release()
    return record


def run(out: Path | None, rounds: int = ROUNDS, tokens: int | None = None) -> Record:
    """Measure all of them; ``tokens`` in place of each length, for tests."""
    device = here()
    result = results.started(kind="encoders", device=device.describe(), rows=[])
    dtype = "bfloat16" if device.kind == "cuda" else "float32"
    for name, (heads, width, (lengths, rates), sizes) in ENCODERS.items():
        case = Case(0, dtype, heads, width, lengths, rates, is_causal=False)
        for length in sizes if tokens is None else (tokens,):
            result["rows"].append(measure(name, replace(case, length=length), device, rounds))
            results.save(result, out)
    print(report.plain(result))
    return result


def main() -> None:
    run(results.program("encoders", __doc__).parse_args().out)


if __name__ == "__main__":
    main()
