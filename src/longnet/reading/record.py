"""The record of a stream: lines of progress, and a saved state that is never ahead of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from longnet.reading.folder import STATE, StreamFolder
from longnet.reading.memory import memory_in_use
from longnet.reading.reader import StreamReader, bits_per_byte
from longnet.reading.settings import StreamSettings
from longnet.reading.source import ByteSource
from longnet.reading.table import StreamResult, format_bytes
from longnet.training.checkpoint import Checkpoint, save_checkpoint
from longnet.training.folder import software_versions
from longnet.training.metrics import Kinds, MetricsLog, is_count, is_number, is_positive, or_none, read_metrics
from longnet.training.progress import Reporter

# A line makes the host wait for the device once.
_LINE_SECONDS = 1.0
_RESULT = "result"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "versions": lambda value: isinstance(value, dict),
    "device": _is_text,
    "dtype": _is_text,
    "chunk": is_count,
    "tokens": or_none(is_count),
}
LINES: Kinds = {
    "settings": {
        **_SETTINGS,
        "run": _is_text,
        "data": lambda value: isinstance(value, list),
        "files": or_none(is_count),
        "bytes": or_none(is_count),
        "fingerprint": or_none(_is_text),
        "cache_bytes": is_count,
    },
    "resumed": _SETTINGS,
    "progress": {
        "position": is_count,
        "new_bytes": is_count,
        "new_seconds": is_positive,
        "tokens_per_second": is_number,
        "bits_per_byte": or_none(is_number),
        "new_bits_per_byte": or_none(is_number),
        "memory": or_none(is_count),
        "memory_peak": or_none(is_count),
        "seconds": is_number,
    },
    _RESULT: {
        "bits_per_byte": or_none(is_number),
        "decades": lambda value: isinstance(value, list),
        "seconds": is_number,
        "tokens_per_second": or_none(is_number),
    },
}
"""The lines of ``stream.jsonl``."""


class StreamRecord:
    """The clock, the record and the state of one stream: ``start``, ``after_chunk`` for every chunk, ``finish``, ``close``.

    Make it before reading: the first state holds the source's fingerprint at the start.

    Args:
        settings: resolved.
        folder: of the stream.
        source, reader: at the position where reading starts.
        device: of the model.
        digest: of the model.
        reporter: receives the progress.

    Attributes:
        saved_position: the position of the last saved state.
    """

    def __init__(
        self,
        settings: StreamSettings,
        folder: StreamFolder,
        source: ByteSource,
        reader: StreamReader,
        device: torch.device,
        digest: str,
        reporter: Reporter,
    ) -> None:
        self._settings, self._folder, self._source, self._reader = settings, folder, source, reader
        self._device, self._digest, self._reporter = device, digest, reporter
        self._fingerprint = source.fingerprint()
        self._recorded_position, self._recorded_nats, self._recorded_seconds = reader.position, 0.0, 0.0
        self.saved_position = reader.position
        self._limit: int | None = None
        self._earlier_seconds, self._started_at, self._line_at, self._saved_at = 0.0, 0.0, 0.0, 0.0
        self._log: MetricsLog | None = None

    @property
    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started_at

    @property
    def _share(self) -> float | None:
        return None if not self._limit else self._reader.position / self._limit

    def start(self, state: Checkpoint | None, limit: int | None) -> None:
        """Make the folder and its first state, or cut the record back to ``state``; start the clock."""
        self._limit = limit
        self._earlier_seconds = self._recorded_seconds = 0.0 if state is None else state.progress["seconds"]
        self._recorded_nats = sum(self._reader.nats())
        self._started_at = self._line_at = self._saved_at = time.monotonic()
        self._folder.path.mkdir(parents=True, exist_ok=True)
        if state is None:
            # Before the record, so that a stream with a record can always be resumed.
            self._write_state()
        # More lines may follow a result.
        self._log = MetricsLog(self._folder.record_file, self._reader.position, "position", _RESULT, LINES)
        about = {
            "versions": software_versions(),
            "device": str(self._device),
            "dtype": self._settings.dtype,
            "chunk": self._settings.chunk,
        }
        if not read_metrics(self._folder.record_file, "position", LINES):
            known = self._source.total is not None
            self._log.write(
                kind="settings",
                position=0,
                run=self._settings.run,
                data=list(self._settings.data),
                files=self._source.files if known else None,
                bytes=self._source.total,
                fingerprint=self._fingerprint if known else None,
                tokens=self._settings.tokens,
                cache_bytes=self._reader.cache.nbytes,
                **about,
            )
        if self._reader.position:
            self._log.write(kind="resumed", position=self._reader.position, tokens=self._settings.tokens, **about)
        memory_in_use(self._device)
        self._reporter.begin("Streaming", self._share)

    def after_chunk(self) -> None:
        """After a chunk: write a line once a second and a state when it is due. Nothing else waits for the device."""
        self._fingerprint = self._source.fingerprint()
        now = time.monotonic()
        if now >= self._saved_at + self._settings.save_every:
            self._save()
        elif now >= self._line_at + _LINE_SECONDS:
            self._line()

    def finish(self, finished: bool) -> StreamResult:
        """Write the last line and the last state, and if ``finished`` the result into the record."""
        assert self._log is not None
        self._line()
        self._reporter.end()
        lines = read_metrics(self._folder.record_file, "position", LINES)
        result = StreamResult.of(self._reader.position, self._reader.nats(), self._recorded_seconds, lines, finished)
        if finished:
            self._log.write(kind=_RESULT, **result.to_dict())
        self._save()
        return result

    def close(self) -> None:
        """Close the record and the progress bar."""
        self._reporter.end()
        if self._log is not None:
            self._log.close()

    def _line(self) -> None:
        """Write a line about the bytes since the last one, if there are any."""
        assert self._log is not None
        position, new = self._reader.position, self._reader.position - self._recorded_position
        if not new:
            return
        nats = sum(self._reader.nats())
        if not math.isfinite(nats):
            raise ValueError(
                f"the loss between the positions {self._recorded_position:,} and {position:,} is {nats}: expected finite "
                f"numbers from the model in {self._settings.run!r} with dtype={self._settings.dtype!r}"
            )
        seconds = self._seconds
        # Rounded up: the clock may measure 0 for a chunk of a few bytes.
        took = max(round(seconds - self._recorded_seconds, 6), 1e-6)
        now, peak = memory_in_use(self._device)
        bits = bits_per_byte(nats, position - 1)
        # The first byte of the stream is read and not predicted.
        predicted = new if self._recorded_position else new - 1
        self._log.write(
            kind="progress",
            position=position,
            new_bytes=new,
            new_seconds=took,
            tokens_per_second=round(new / took, 1),
            bits_per_byte=bits,
            new_bits_per_byte=bits_per_byte(nats - self._recorded_nats, predicted),
            memory=now,
            memory_peak=peak,
            seconds=round(seconds, 3),
        )
        self._recorded_position, self._recorded_nats, self._recorded_seconds = position, nats, seconds
        self._line_at = time.monotonic()
        self._reporter.advance(
            self._share,
            f"{position:,} bytes  {bits or 0.0:.4f} bits/byte  {new / took:,.0f} tokens/s  {format_bytes(peak)}",
        )

    def _save(self) -> None:
        """Commit the state. The record reaches the disk first, and has a line for exactly this position."""
        assert self._log is not None
        self._line()
        self._log.flush_to_disk()
        self._write_state()
        self._saved_at, self.saved_position = time.monotonic(), self._reader.position

    def _write_state(self) -> None:
        progress = {
            "position": self._reader.position,
            "seconds": self._recorded_seconds,
            "settings": self._settings.to_dict(),
            "data": self._fingerprint,
            "model": self._digest,
            "device": str(self._device),
        }
        save_checkpoint(self._folder.state_file, self._reader.state_dict(), progress, STATE)
