"""A model trained dense at 1k goes on at 16k: the same weights, with dilated attention.

    python examples/finetune_long.py                # about 2 minutes on a GPU, 15 on two CPU cores
    python examples/finetune_long.py --quick        # seconds, to see that it runs

A Llama of a few million parameters learns the bytes of Python's own standard library (no download), first with its own
attention in windows of 1,024 bytes, then under ``longnet.hf.apply`` in windows of 16,384. Writes ``finetune_long.json`` and
``finetune_long.png`` into ``--out``. Needs ``pip install '.[hf,train]'``.
"""

# A command prints.
from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

import longnet.hf
from longnet.training import read_corpus
from longnet.training.data import cut_windows, draw_windows


@dataclass(frozen=True)
class Settings:
    """Sizes; ``short`` and ``long`` are bytes per window, batches are windows per step."""

    dim: int
    layers: int
    short: int = 1024
    long: int = 16384
    short_batch: int = 4
    long_batch: int = 1
    short_steps: int = 240
    long_steps: int = 40
    evaluated: int = 4  # held-out windows of ``long`` bytes
    lr: float = 1e-3
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384)
    dilation_rates: tuple[int, ...] = (1, 2, 8)


HEADS = 8
ON_CPU = Settings(dim=192, layers=4)
ON_GPU = Settings(dim=512, layers=8, short_batch=32, long_batch=4, short_steps=700, long_steps=200, evaluated=32)
QUICK = Settings(
    dim=32, layers=2, short=64, long=256, short_batch=4, short_steps=6, long_steps=4, evaluated=2,
    segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 8),
)  # fmt: skip


def make_model(settings: Settings) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=settings.dim,
        intermediate_size=settings.dim * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=HEADS,
        max_position_embeddings=settings.long,
        # Slow rotations: distances of the second stage are new to the model, but not far from what it knows.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def bits(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean bits per byte of next bytes, (B, N) each."""
    device = model.device
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with half:
        logits = model(input_ids=tokens.to(device), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten()) / math.log(2)


def train(model: Any, stream: np.ndarray, context: int, batch: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Losses by step, and bytes per second once it runs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    losses, started = [], 0.0
    model.train()
    for step in range(steps):
        if step == min(2, steps - 1):
            # What is compiled and allocated first is not speed.
            started = time.perf_counter()
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        loss = bits(model, *draw_windows(stream, context, batch, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            print(f"  step {step:4d} of {steps}: {losses[-1]:.3f} bits per byte", flush=True)
    timed = steps - min(2, steps - 1)
    rate = timed * batch * context / (time.perf_counter() - started)
    return {"context": context, "batch": batch, "losses": losses, "tokens_per_second": rate}


@torch.no_grad()
def evaluate(model: Any, held_out: np.ndarray, settings: Settings) -> dict[str, float]:
    """Bits per byte of the same held-out bytes, read in windows of either length."""
    model.eval()
    found = {}
    for context in (settings.short, settings.long):
        starts = np.arange(settings.evaluated * settings.long // context) * context
        sums = [
            bits(model, *cut_windows(held_out, context, some)).item() * len(some)
            for some in np.array_split(starts, max(1, len(starts) * context // (4 * settings.long)))
        ]
        found[str(context)] = sum(sums) / len(starts)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    read = 0.0
    for stage, color in (("dense", "tab:gray"), ("dilated", "tab:blue")):
        run = result["stages"][stage]
        step = run["context"] * run["batch"] / 1e6
        place = read + step * np.arange(1, len(run["losses"]) + 1)
        axes.plot(place, run["losses"], color=color, linewidth=1, label=f"{stage}, windows of {run['context']:,}")
        read = float(place[-1])
    axes.set_xlabel("million bytes trained on")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds, and nothing learned")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_long"), help="the folder to write to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()

    settings = QUICK if chosen.quick else ON_GPU if chosen.device.startswith("cuda") else ON_CPU
    corpus = read_corpus()
    room = (corpus.held_out.size - 1) // settings.long
    settings = replace(settings, evaluated=min(settings.evaluated, room))
    torch.manual_seed(chosen.seed)
    model: Any = make_model(settings).to(chosen.device)
    held_out = corpus.held_out
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters on {chosen.device}, {corpus.train.size:,} bytes of {corpus.source}")

    print(f"Dense, windows of {settings.short:,}")
    short = (settings.short, settings.short_batch, settings.short_steps)
    stages = {"dense": train(model, corpus.train, *short, settings.lr, chosen.seed)}
    scores = {"dense": evaluate(model, held_out, settings)}

    longnet.hf.apply(model, settings.segment_lengths, settings.dilation_rates)
    scores["dilated, before training"] = evaluate(model, held_out, settings)
    print(f"Dilated, windows of {settings.long:,}")
    long = (settings.long, settings.long_batch, settings.long_steps)
    stages["dilated"] = train(model, corpus.train, *long, settings.lr / 2, chosen.seed + 1)
    scores["dilated"] = evaluate(model, held_out, settings)

    result = {
        "settings": asdict(settings),
        "parameters": parameters,
        "device": torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else chosen.device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": corpus.describe() | {"source": "Python's standard library"},
        "stages": stages,
        "held_out_bits_per_byte": scores,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "finetune_long.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, chosen.out / "finetune_long.png")
    for stage, by_context in scores.items():
        print(f"{stage:26s}" + "".join(f"  {int(n):>7,} bytes: {score:.3f}" for n, score in by_context.items()))
    print(f"Wrote {chosen.out}/finetune_long.json and .png")


if __name__ == "__main__":
    main()
