"""The one runner: sizes and sections to steps, steps to one result that holds every repetition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks import memory as peak
from benchmarks.cases import LIMITS, PASSES, Sizes
from benchmarks.checks import against_oracle
from benchmarks.growth import growth
from benchmarks.imports import import_time
from benchmarks.peers import Peer, load_torchscale
from benchmarks.speed import noise, speed
from benchmarks.stream import stream

SECTIONS = ("noise", "speed", "memory", "import", "growth", "stream")
SCHEMA = 1


@dataclass(frozen=True)
class Step:
    """A part of the run: ``run`` adds its records to the result."""

    label: str
    run: Callable[[], None]


class Benchmark:
    """A run to be made step by step; ``result`` is complete after the last one and plain JSON throughout."""

    def __init__(self, sizes: Sizes, sections: tuple[str, ...] = SECTIONS, torchscale: Path | None = None) -> None:
        for section in sections:
            if section not in SECTIONS:
                raise ValueError(f"section={section!r} is unknown: expected some of {SECTIONS}")
        self.sizes, self.sections, self.torchscale = sizes, sections, torchscale
        self.peers: list[Peer] = []
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": environment.commit(),
            "versions": environment.versions(),
            "device": environment.device(),
            "limits": LIMITS,
            "judged": sizes.judged,
            "pattern": {key: list(value) for key, value in sizes.base.to_dict().items() if isinstance(value, tuple)},
            "peers": [],
            "checks": [],
            "noise": [],
            "speed": [],
            "memory": [],
            "memory_why_not": None,
            "import": None,
            "growth": [],
            "stream": [],
        }

    def steps(self) -> list[Step]:
        """The definition first: a wrong result ends the run before anything is timed."""
        found = [Step(f"checking {dtype} against the oracle", self._check(dtype)) for dtype in self.sizes.dtypes]
        found.append(Step("looking for peers", self._load_peers))
        by_section = {
            "noise": self._noise_steps,
            "speed": self._speed_steps,
            "memory": self._memory_steps,
            "import": self._import_steps,
            "growth": self._growth_steps,
            "stream": self._stream_steps,
        }
        for section in SECTIONS:
            if section in self.sections:
                found += by_section[section]()
        found.append(Step("done", self._finish))
        return found

    def _finish(self) -> None:
        self.result["device"]["load_average_after"] = environment.load_average()

    def _add(self, section: str, label: str, measure: Callable[[], dict[str, Any]]) -> Step:
        return Step(label, lambda: self.result[section].append(measure()))

    def _check(self, dtype: str) -> Callable[[], None]:
        case = self.sizes.case(self.sizes.base.length, dtype)
        return lambda: self.result["checks"].extend(asdict(check) for check in against_oracle(case))

    def _load_peers(self) -> None:
        self.peers.append(load_torchscale(self.torchscale, self.sizes.base))
        self.result["peers"] = [peer.to_dict() for peer in self.peers]

    def _noise_steps(self) -> list[Step]:
        cases = [self.sizes.case(min(self.sizes.speed_lengths), dtype) for dtype in self.sizes.dtypes]
        return [self._add("noise", f"noise, {case}", partial(noise, case, self.sizes)) for case in cases]

    def _speed_steps(self) -> list[Step]:
        cases = [self.sizes.case(length, dtype) for length in self.sizes.speed_lengths for dtype in self.sizes.dtypes]
        return [self._add("speed", f"speed, {case}", partial(speed, case, self.peers, self.sizes)) for case in cases]

    def _memory_steps(self) -> list[Step]:
        self.result["memory_why_not"] = peak.why_not()
        if self.result["memory_why_not"]:
            return []
        return [
            self._add(
                "memory",
                f"memory, N={length} {dtype} {which}",
                partial(peak.memory, self.sizes.case(length, dtype), which, self.sizes.memory_processes(length)),
            )
            for dtype in self.sizes.dtypes
            for which in PASSES
            for length in self.sizes.memory_lengths
        ]

    def _import_steps(self) -> list[Step]:
        def measure() -> None:
            self.result["import"] = import_time(self.sizes.import_repetitions)

        return [Step("import time", measure)]

    def _growth_steps(self) -> list[Step]:
        lengths = f"N={min(self.sizes.growth_lengths)} to {max(self.sizes.growth_lengths)}"
        return [
            self._add("growth", f"growth, {lengths} {dtype}", partial(growth, dtype, self.peers, self.sizes))
            for dtype in self.sizes.dtypes
        ]

    def _stream_steps(self) -> list[Step]:
        # Peaks of resident memory are read where those of the calls are.
        self.result["memory_why_not"] = peak.why_not()
        if self.result["memory_why_not"]:
            return []
        reading = self.sizes.reading
        return [self._add("stream", f"stream, {reading.tokens} tokens", partial(stream, reading))]
