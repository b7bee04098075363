"""``longnet`` with graphs that run as they were traced: ``compiled_run.py train ... --compile``. Prints how many there were."""

from __future__ import annotations

import sys

import torch

from longnet.cli.main import run

MADE = []


def traced(graph, inputs, **options):
    MADE.append(graph)
    return graph.forward


if __name__ == "__main__":
    real = torch.compile
    torch.compile = lambda function, **options: real(function, backend=traced, **options)
    try:
        run()
    finally:
        sys.stderr.write(f"{len(MADE)} graphs\n")
