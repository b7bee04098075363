"""The result of a stream: bits per byte by decade of position, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longnet.reading.reader import bits_per_byte, decade_counts
from longnet.training.progress import format_seconds


@dataclass(frozen=True)
class Tenth:
    """A tenth of a stream, to the nearest lines of its record: its speed and its largest memory (None if unknown)."""

    tokens_per_second: float
    peak_memory: int | None


@dataclass(frozen=True)
class StreamResult:
    """How a call of ``stream`` ended.

    Attributes:
        position: bytes read in all.
        finished: False if it was asked to stop before the end.
        seconds: time spent reading in all, over every resumption.
        decades: ``(bytes predicted, bits per byte)`` at the positions 0 to 9, 10 to 99, ...
        bits_per_byte: over all bytes but the first; None if none is read yet.
        first, last: the first and the last tenth; None if nothing is read yet.
    """

    position: int
    finished: bool
    seconds: float
    decades: tuple[tuple[int, float], ...]
    bits_per_byte: float | None
    first: Tenth | None
    last: Tenth | None

    @classmethod
    def of(
        cls, position: int, nats: Sequence[float], seconds: float, lines: Sequence[dict[str, Any]], finished: bool
    ) -> StreamResult:
        """From the losses by decade in nats and the lines of the record."""
        pairs = [
            (count, bits)
            for count, nat in zip(decade_counts(position), nats, strict=True)
            if (bits := bits_per_byte(nat, count)) is not None
        ]
        progress = [line for line in lines if line["kind"] == "progress"]
        # A line is about the bytes since the previous line.
        begins = [0, *(line["position"] for line in progress)][:-1]
        first = [line for begin, line in zip(begins, progress, strict=True) if begin < position / 10]
        last = [line for line in progress if line["position"] > position * 9 / 10]
        overall = bits_per_byte(sum(nats), position - 1) if position > 1 else None
        return cls(position, finished, seconds, tuple(pairs), overall, _tenth(first), _tenth(last))

    def to_dict(self) -> dict[str, Any]:
        """The last line of the record, without its kind."""
        return {
            "position": self.position,
            "bits_per_byte": self.bits_per_byte,
            "decades": [
                {"first": 10**k if k else 0, "last": 10 ** (k + 1) - 1, "bytes": count, "bits_per_byte": bits}
                for k, (count, bits) in enumerate(self.decades)
            ],
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.position / self.seconds, 1) if self.seconds else None,
            **{
                f"{name}_tenth": {"tokens_per_second": tenth.tokens_per_second, "memory_peak": tenth.peak_memory}
                for name, tenth in (("first", self.first), ("last", self.last))
                if tenth is not None
            },
        }


def format_table(result: StreamResult) -> str:
    """The result as a few lines of text."""
    rows = [("position", "bytes", "bits per byte")]
    for k, (count, bits) in enumerate(result.decades):
        rows.append((f"{10**k if k else 0:,} to {10 ** (k + 1) - 1:,}", f"{count:,}", f"{bits:.4f}"))
    rows.append(("all but the first", f"{result.position - 1:,}", f"{result.bits_per_byte or 0.0:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    speed = result.position / result.seconds if result.seconds else 0.0
    lines.append("")
    lines.append(f"{result.position:,} bytes in {format_seconds(result.seconds)}, {speed:,.0f} tokens/s")
    for name, tenth in (("first", result.first), ("last", result.last)):
        if tenth is not None:
            lines.append(
                f"{name + ' tenth:':<12} {tenth.tokens_per_second:,.0f} tokens/s, peak memory {format_bytes(tenth.peak_memory)}"
            )
    return "\n".join(lines)


def format_bytes(count: int | None) -> str:
    """``3 << 20`` as ``3 MiB``."""
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"


def _tenth(lines: Sequence[dict[str, Any]]) -> Tenth | None:
    if not lines:
        return None
    took = sum(line["new_seconds"] for line in lines)
    peaks = [line["memory_peak"] for line in lines if line["memory_peak"] is not None]
    return Tenth(round(sum(line["new_bytes"] for line in lines) / took, 1), max(peaks, default=None))
