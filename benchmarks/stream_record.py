"""What a long run of ``longnet stream`` found, as a result that the documents can show.

    python -m benchmarks.stream_record RUN/stream --run RUN --commit SHA --device "NVIDIA H100 80GB HBM3" --out result.json

Reads the record that the command wrote; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.runner import SCHEMA
from benchmarks.tables import Table, commit_name
from benchmarks.verdicts import Result

KIND = "stream record"
# One pass over a billion tokens: seconds, GiB, and how much more memory the last tenth may take than the first.
LIMITS = {"seconds": 600, "memory_gib": 16, "growth": 0.02}


def collect(stream: Path, run: Path, device: str, commit: str, text_bytes: int) -> Result:
    """The record of ``stream`` in slices of an eightieth, and what it was trained on."""
    lines = [json.loads(line) for line in (stream / "stream.jsonl").read_text().splitlines()]
    settings, result = lines[0], lines[-1]
    if settings["kind"] != "settings" or result["kind"] != "result":
        raise ValueError(f"{stream} holds no finished stream: expected a record from settings to result")
    training = json.loads((run / "run.json").read_text())["settings"]
    progress = [line for line in lines if line["kind"] == "progress"]
    step = -(-result["position"] // 80)
    slices: dict[int, list[dict[str, Any]]] = {}
    for line in progress:
        slices.setdefault((line["position"] - 1) // step, []).append(line)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "commit": {"sha": commit, "dirty": False},
        "device": {"kind": "cuda", "name": device},
        "versions": settings["versions"],
        "text_bytes": text_bytes,
        "limits": LIMITS,
        "training": {name: value for name, value in training.items() if name not in ("out", "data")},
        "stream": {key: settings[key] for key in ("bytes", "files", "tokens", "chunk", "dtype", "cache_bytes")},
        "result": result,
        "slices": [
            {
                "position": lines[-1]["position"],
                "bits_per_byte": sum(x["new_bits_per_byte"] * x["new_bytes"] for x in lines)
                / sum(x["new_bytes"] for x in lines),
                "tokens_per_second": sum(x["new_bytes"] for x in lines) / sum(x["new_seconds"] for x in lines),
                "memory_peak": max(x["memory_peak"] for x in lines),
            }
            for lines in slices.values()
        ],
    }


def header(result: Result) -> str:
    versions = result["versions"]
    return f"{commit_name(result['commit'])}; torch {versions['torch']}, {result['device']['name']}"


def tables(result: Result) -> list[Table]:
    """Bits per byte by decade of position; time and memory against their limits."""
    found, limits = result["result"], result["limits"]
    decades = tuple(
        (f"{one['first']:,} to {one['last']:,}", f"{one['bytes']:,}", f"{one['bits_per_byte']:.3f}")
        for one in found["decades"]
    )
    first, last = found["first_tenth"], found["last_tenth"]
    memory = max(one["memory_peak"] for one in result["slices"])
    growth = last["memory_peak"] / first["memory_peak"] - 1
    text = [one for one in result["slices"] if one["position"] <= result["text_bytes"]]
    bits = [one["bits_per_byte"] for one in text]
    figures = (
        ("tokens", f"{found['position']:,}", "-", "-"),
        ("seconds", f"{found['seconds']:.0f}", f"{limits['seconds']}", _verdict(found["seconds"] <= limits["seconds"])),
        ("tokens/s", f"{found['tokens_per_second']:,.0f}", "-", "-"),
        (
            "peak GPU memory GiB",
            f"{memory / 2**30:.2f}",
            f"{limits['memory_gib']}",
            _verdict(memory / 2**30 <= limits["memory_gib"]),
        ),
        (
            "last tenth's peak over the first's, less 1",
            f"{growth:.1%}",
            f"{limits['growth']:.0%}",
            _verdict(growth <= limits["growth"]),
        ),
        ("text at the start, bytes", f"{result['text_bytes']:,}", "-", "-"),
        ("bits per byte of its slices, mean", f"{_mean(bits):.3f}", "-", "-"),
        ("least and most", f"{min(bits):.3f} and {max(bits):.3f}", "-", "-"),
        (
            "first and last quarter",
            f"{_mean(bits[: len(bits) // 4]):.3f} and {_mean(bits[-(len(bits) // 4) :]):.3f}",
            "-",
            "-",
        ),
        ("cache MiB", f"{result['stream']['cache_bytes'] / 2**20:.0f}", "-", "-"),
    )
    return [
        Table("Bits per byte, by position", ("position", "bytes", "bits per byte"), decades),
        Table("A long stream", ("what", "found", "limit", "verdict"), figures),
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def summary(result: Result) -> list[str]:
    table = tables(result)[1]
    missed = [row[0] for row in table.rows if row[3] == "missed"]
    return [f"missed: {name}" for name in missed] or ["all limits reached"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stream_record", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("stream", type=Path, help="the folder that longnet stream wrote")
    parser.add_argument("--run", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--device", required=True, help="what it ran on, in words")
    parser.add_argument("--commit", required=True, help="of the sources that ran")
    parser.add_argument("--text-bytes", type=int, required=True, help="of the data's start, as scripts/corpus.py says")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = collect(options.stream, options.run, options.device, options.commit, options.text_bytes)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n\n".join(table.plain() for table in tables(result)))


if __name__ == "__main__":
    main()
