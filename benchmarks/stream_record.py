"""The record of a long run of ``longnet stream``, as a result that the documents can show.

    python -m benchmarks.stream_record RUN/stream --run RUN --commit SHA --device "NVIDIA H100 80GB HBM3" --out result.json

Reads the record that the command wrote; nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report, results
from benchmarks.cases import Record

# One pass over a billion tokens: seconds, GiB, and how much more memory the last tenth may take than the first.
LIMITS = {"seconds": 600, "memory_gib": 16, "growth": 0.02}


def collect(stream: Path, run: Path, device: str, commit: str, text_bytes: int) -> Record:
    """The record of ``stream`` in slices of an eightieth, and what it was trained on."""
    lines = [json.loads(line) for line in (stream / "stream.jsonl").read_text().splitlines()]
    settings, result = lines[0], lines[-1]
    if settings["kind"] != "settings" or result["kind"] != "result":
        raise ValueError(f"{stream} holds no finished stream: expected a record from settings to result")
    training = json.loads((run / "run.json").read_text())["settings"]
    step = -(-result["position"] // 80)
    slices: dict[int, list[Record]] = {}
    for line in lines:
        if line["kind"] == "progress":
            slices.setdefault((line["position"] - 1) // step, []).append(line)
    return {
        "schema": results.SCHEMA,
        "kind": "stream record",
        "commit": {"sha": commit, "dirty": False},
        "device": {"kind": "cuda", "name": device},
        "versions": settings["versions"],
        "text_bytes": text_bytes,
        "limits": LIMITS,
        "training": {name: value for name, value in training.items() if name not in ("out", "data")},
        "stream": {key: settings[key] for key in ("bytes", "files", "tokens", "chunk", "dtype", "cache_bytes")},
        "result": result,
        "slices": [_slice(one) for one in slices.values()],
    }


def _slice(lines: list[Record]) -> Record:
    size = sum(line["new_bytes"] for line in lines)
    return {
        "position": lines[-1]["position"],
        "bits_per_byte": sum(line["new_bits_per_byte"] * line["new_bytes"] for line in lines) / size,
        "tokens_per_second": size / sum(line["new_seconds"] for line in lines),
        "memory_peak": max(line["memory_peak"] for line in lines),
    }


def main() -> None:
    parser = results.program("stream_record", __doc__, out_required=True)
    parser.add_argument("stream", type=Path, help="the folder that longnet stream wrote")
    parser.add_argument("--run", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--device", required=True, help="what it ran on")
    parser.add_argument("--commit", required=True, help="of the sources that ran")
    parser.add_argument("--text-bytes", type=int, required=True, help="of the data's start, as scripts/corpus.py says")
    options = parser.parse_args()
    result = collect(options.stream, options.run, options.device, options.commit, options.text_bytes)
    results.save(result, options.out)
    print(report.plain(result))


if __name__ == "__main__":
    main()
