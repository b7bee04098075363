"""``longnet`` with graphs that run as they were traced: ``compiled_run.py by-block train ... --compile``; prints how many.

With ``by-block`` several processes gather the weights of each block for itself, as of a large model; with ``as-one`` all at once.
"""

from __future__ import annotations

import sys

import torch

from longnet import distributed
from longnet.cli.main import run

MADE = []


def traced(graph, inputs, **options):
    MADE.append(graph)
    return graph.forward


if __name__ == "__main__":
    if sys.argv.pop(1) == "by-block":
        distributed.GATHERED_AS_ONE = 0
    real = torch.compile
    torch.compile = lambda function, **options: real(function, backend=traced, **options)
    try:
        run()
    finally:
        sys.stderr.write(f"{len(MADE)} graphs\n")
