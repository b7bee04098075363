"""Sizes and sections to steps, steps to one result that is complete enough to be written after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.cases import PASSES, Case
from benchmarks.checks import small_against_oracle
from benchmarks.gpu import sections
from benchmarks.gpu.cases import LIMITS, SECTIONS, GpuSizes, place
from benchmarks.gpu.longest import longest
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.speed import speed
from benchmarks.gpu.stream import decode, stream_rows
from benchmarks.gpu.warm import compile_kernels
from benchmarks.peers import Peer, load_alexisrozhkov, load_dilated_attention_pytorch, load_torchscale
from benchmarks.runner import SCHEMA, Step


@dataclass(frozen=True)
class Checkouts:
    """Where other implementations lie, each or none."""

    torchscale: Path | None = None
    dilated_attention_pytorch: Path | None = None
    alexisrozhkov: Path | None = None


@dataclass
class GpuBenchmark:
    """A run to be made step by step; ``result`` is plain JSON throughout."""

    machine: Machine
    sizes: GpuSizes
    sections: tuple[str, ...] = SECTIONS
    checkouts: Checkouts = Checkouts()
    commit: str | None = None
    compile_kernels: Callable[[Iterable[Case], int], int] = compile_kernels
    peers: list[Peer] = field(default_factory=list)
    result: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for section in self.sections:
            if section not in SECTIONS:
                raise ValueError(f"section={section!r} is unknown: expected some of {SECTIONS}")
        base = self.sizes.base
        self.result = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": environment.commit(self.commit),
            "versions": environment.versions() | environment.gpu_versions(),
            "device": self.machine.describe(),
            "limits": LIMITS,
            "judged": self.sizes.judged,
            "pattern": {
                "segment_lengths": list(base.segment_lengths),
                "dilation_rates": list(base.dilation_rates),
            },
            "peers": [],
            "checks": [],
            "ceilings": None,
            "speed": [],
            "memory": [],
            "gigapath": [],
            "growth": [],
            "curves": [],
            "longest": [],
            "stream": [],
        }

    def steps(self) -> list[Step]:
        """Kernels first, then the definition: a wrong result ends the run before anything is timed."""
        found = [Step("compiling kernels", self._compile)]
        found += [Step(f"checking {place(c.to_dict(), PASSES[1])}", partial(self._check, c)) for c in self.sizes.oracle]
        found.append(Step("loading other implementations", self._load_peers))
        for section in SECTIONS:
            if section in self.sections:
                found += getattr(self, f"_{section}")()
        return found

    def _compile(self) -> None:
        cases = dict.fromkeys(self.sizes.of(self.sections))
        self.compile_kernels(cases, self.machine.describe()["memory_bytes"])

    def _check(self, case: Case) -> None:
        checks = small_against_oracle(case, self.machine.device, ("portable",))
        self.result["checks"].extend(asdict(check) for check in checks)
        self.machine.release()

    def _load_peers(self) -> None:
        self.peers = [
            load_torchscale(self.checkouts.torchscale, self.sizes.base, self.machine.device),
            load_dilated_attention_pytorch(self.checkouts.dilated_attention_pytorch),
            load_alexisrozhkov(self.checkouts.alexisrozhkov),
        ]
        self.result["peers"] = [peer.to_dict() for peer in self.peers]

    def _step(self, section: str, label: str, measure: Callable[[], Any]) -> Step:
        def run() -> None:
            found = measure()
            if section == "ceilings":
                self.result[section] = found
            else:
                self.result[section].extend(found if isinstance(found, list) else [found])
            self.machine.release()

        return Step(f"{section}: {label}", run)

    def _ceilings(self) -> list[Step]:
        return [self._step("ceilings", "matrix product and copy", partial(sections.ceilings, self.machine, self.sizes))]

    def _speed(self) -> list[Step]:
        # Peers are loaded by an earlier step, so they are looked up when the step runs.
        def measure(case: Case) -> list[dict[str, Any]]:
            return speed(self.machine, case, self.peers, self.sizes)

        return [self._step("speed", _name(case), partial(measure, case)) for case in self.sizes.speed]

    def _memory(self) -> list[Step]:
        def measure(case: Case, which: str) -> dict[str, Any]:
            return sections.memory(self.machine, case, which, self.peers)

        return [
            self._step("memory", place(case.to_dict(), which), partial(measure, case, which))
            for case in self.sizes.memory
            for which in PASSES
        ]

    def _gigapath(self) -> list[Step]:
        def measure(case: Case) -> dict[str, Any]:
            return sections.gigapath(self.machine, case, self.peers, self.sizes)

        return [self._step("gigapath", _name(case), partial(measure, case)) for case in self.sizes.gigapath]

    def _growth(self) -> list[Step]:
        def measure(which: str) -> dict[str, Any]:
            return sections.growth(self.machine, which, self.sizes)

        def draw_curves(which: str) -> dict[str, Any]:
            return sections.curves(self.machine, which, self.peers, self.sizes)

        first, last = self.sizes.growth[0].length, self.sizes.growth[-1].length
        found = [self._step("growth", f"N={first} to {last} {which}", partial(measure, which)) for which in PASSES]
        return found + [self._step("curves", which, partial(draw_curves, which)) for which in PASSES]

    def _longest(self) -> list[Step]:
        return [self._step("longest", which, partial(longest, self.machine, which, self.sizes)) for which in PASSES]

    def _stream(self) -> list[Step]:
        base, sizes = self.sizes.base, self.sizes.stream

        def rows(length: int, chunk: int, tail: int) -> dict[str, Any]:
            return stream_rows(self.machine, replace(base, length=length), chunk, tail)

        found = [
            self._step(
                "stream",
                f"N={length} in chunks of {chunk}, then {tail} single tokens",
                partial(rows, length, chunk, tail),
            )
            for length, chunk, tail in sizes.rows
        ]
        return [*found, self._step("stream", "single tokens, timed", partial(decode, self.machine, base, sizes))]


def _name(case: Case) -> str:
    return place(case.to_dict(), "forward").removesuffix(" forward")
