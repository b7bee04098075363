"""Which kernels a training step of Prov-GigaPath's slide encoder runs on a GPU, by their time.

    python -m benchmarks.profile_encoder            # 45,680 tiles, with the encoder's defaults and compiled

Each mode is warmed up, timed over rounds of three steps one after the other, and profiled over one step.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Cuda
from benchmarks.gigapath import choose, make, slide, step

ROUNDS, STEPS, SHOWN = 5, 3, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=45_680)
    tiles = parser.parse_args().tiles
    device = Cuda()
    model = make(device.device).train()
    x, coords = slide(tiles, device.device)
    for mode in ("longnet", "longnet compiled"):
        choose(model, mode)
        for _ in range(STEPS):
            step(model, x, coords)
        seconds = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(STEPS):
                step(model, x, coords)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / STEPS)
        print(f"{mode}, {tiles:,} tiles: {1e3 * median(seconds):.1f} ms a step")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            step(model, x, coords)
            torch.cuda.synchronize()
        print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=SHOWN, max_name_column_width=70))


if __name__ == "__main__":
    main()
