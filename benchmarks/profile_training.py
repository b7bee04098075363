"""How long a step of ``longnet train`` keeps a GPU busy, how long it waits for the host, and which kernels take the time.

    python -m benchmarks.profile_training --stacks "balanced;dense" --context 8192

The models, text and settings are those of ``benchmarks.learning.equal_time``. Steps are timed without the profiler first.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.learning import kinds
from benchmarks.learning.data import read_text
from benchmarks.learning.equal_time import STEP_BYTES, Plan, corpus_of, model_of, stack_names
from longnet.training import train

# Steps that compile, those that are timed, and those that are profiled.
BEFORE, TIMED, PROFILED, SHOWN = 5, 30, 3, 25


@dataclass
class Watch:
    """Called after every step: times steps, then profiles some."""

    marks: list[float] = field(default_factory=list)
    profiler: Any = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        self.marks.append(time.perf_counter())
        if len(self.marks) == BEFORE + TIMED:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self.profiler = profile(activities=activities, acc_events=True)
            self.profiler.start()
        if len(self.marks) == BEFORE + TIMED + PROFILED:
            self.profiler.stop()

    def seconds(self) -> float:
        """Median of a timed step."""
        marks = self.marks[BEFORE - 1 : BEFORE + TIMED]
        return median(after - before for before, after in pairwise(marks))

    def busy_seconds(self) -> float:
        """Of the device, a step: no instant counts twice."""
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events()
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        )
        busy = end = 0.0
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return busy / 1e6 / PROFILED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", type=stack_names, default=["balanced"], help="names, by semicolons")
    parser.add_argument("--context", type=kinds.count, default=8192)
    parser.add_argument("--batch", type=kinds.count, help="windows a step; by default 131,072 bytes")
    parser.add_argument("--layers", type=kinds.count, default=8)
    parser.add_argument("--dim", type=kinds.count, default=512)
    parser.add_argument("--heads", type=kinds.count, default=8)
    parser.add_argument(
        "--data", type=kinds.existing, action="append", help="folders of text; installed packages by default"
    )
    options = parser.parse_args()
    corpus = corpus_of(read_text(options.data or [Path(sysconfig.get_paths()["purelib"])]))
    batch = options.batch or max(1, STEP_BYTES // options.context)
    for stack in options.stacks:
        model = model_of(stack, options.context, options.layers, options.dim, options.heads)
        plan = Plan(stack, 0, options.context, None, model, batch)
        watch = Watch()
        with tempfile.TemporaryDirectory() as folder:
            settings = plan.settings(Path(folder) / "run", BEFORE + TIMED + PROFILED, save_every=0)
            train(settings, corpus=corpus, callbacks=[watch])
        print(
            f"{stack}, {batch} x {options.context:,}: {1e3 * watch.seconds():.1f} ms a step, "
            f"the GPU is busy for {1e3 * watch.busy_seconds():.1f} ms of it"
        )
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(watch.profiler.key_averages().table(sort_by=key, row_limit=SHOWN, max_name_column_width=70), flush=True)


if __name__ == "__main__":
    main()
