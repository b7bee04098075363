"""A synthetic cohort for `longnet slide-finetune`: tile embeddings with places, and a table with targets of every task.

    python examples/make_cohort.py cohort
    longnet slide-finetune cohort/table.csv --features cohort/features --task classification --dim 32 --depth 1 --lr 5e-3 \
        --layer-decay 1 --dropout 0 --drop-path 0 --accumulate 4 --epochs 12 --out runs/cohort

A slide is tissue of random tiles. On a slide that is "tumour", a spot of tiles carries a marker: a shift of the embedding in one
direction. A larger spot means a higher score; a tumour means earlier events. With --no-signal no tile carries the marker: a model
that still finds something has seen its test slides.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from safetensors.torch import save_file

TILE = 256
SHARE = 0.15
"""Of the tiles of a tumour slide that carry the marker, at most; at least half as many."""
SHIFT = 5.0
"""Of a marked tile, in standard deviations of its embedding's channels together."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a synthetic cohort of slides.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--patients", type=int, default=60)
    parser.add_argument("--slides", type=int, default=1, help="of each patient")
    parser.add_argument("--tiles", type=int, default=60, help="of a slide, about")
    parser.add_argument("--channels", type=int, default=16, help="of a tile embedding")
    parser.add_argument("--no-signal", action="store_true", help="no tile carries the marker")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    features = options.out / "features"
    features.mkdir(parents=True)
    directions = torch.linalg.qr(torch.randn(options.channels, 2, generator=generator)).Q.T
    rows = []
    for patient in range(options.patients):
        # The label a: the marker in the first direction. The label b, independent of it: in the second.
        has = torch.rand(2, generator=generator) < 0.5
        for slide in range(options.slides):
            count = int(options.tiles * (0.8 + 0.4 * torch.rand((), generator=generator)))
            side = round((1.5 * count) ** 0.5)
            cell = torch.randperm(side * side, generator=generator)[:count]
            places = torch.stack((cell % side, cell // side), 1)
            x = torch.randn(count, options.channels, generator=generator)
            shares = SHARE * (0.5 + 0.5 * torch.rand(2, generator=generator)) * has
            for direction, share in zip(directions, shares.tolist(), strict=True):
                center = places[torch.randint(count, (), generator=generator)]
                # A spot: the tiles nearest to its center.
                spot = (places - center).square().sum(1).argsort()[: round(share * count)]
                if not options.no_signal:
                    x[spot] += SHIFT * direction
            name = f"P{patient:03d}-{slide}"
            save_file({"features": x.half(), "coords": places * TILE}, features / f"{name}.safetensors")
            noise = torch.randn((), generator=generator)
            score = 100 * float(shares[0]) + 2 * float(noise)
            # Months; a tumour multiplies the hazard by six. Observation ends after some time.
            # All slides of a patient have the patient's.
            if slide == 0:
                hazard = 0.02 * (6.0 if has[0] else 1.0)
                time, end = (-torch.rand(2, generator=generator).clamp_min(1e-6).log()).tolist()
                time, end = time / hazard, 10 + 40 * end
            rows.append(
                {
                    "slide": name,
                    "patient": f"P{patient:03d}",
                    "label": "tumour" if has[0] else "normal",
                    "label_a": int(has[0]),
                    "label_b": int(has[1]),
                    "score": f"{score:.3f}",
                    "time": f"{min(time, end):.3f}",
                    "event": int(time <= end),
                }
            )
    with open(options.out / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} slides of {options.patients} patients in {options.out}")


if __name__ == "__main__":
    main()
