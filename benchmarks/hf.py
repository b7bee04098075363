"""What Hugging Face's clothes cost: a training step of longnet.hf.LongNetForCausalLM against the plain LongNetLM.

    python -m benchmarks.hf --out hf.json

Both have the same parameters. Loss and gradients are compared first; then rounds time in turn forward and backward of each, the
plain one with the same loss function on its logits, and, for information, with its own loss, which holds fewer logits.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks import environment
from benchmarks.timing import interleave, quartiles
from longnet import LongNetConfig, LongNetLM
from longnet.hf import LongNetForCausalLM

# Time of a step in transformers' form over the plain model's.
LIMIT = 1.03
ROUNDS = 31


def sizes(on_gpu: bool) -> tuple[LongNetConfig, int]:
    """The model, and the tokens of a step."""
    if on_gpu:
        return LongNetConfig.preset("base"), 32768
    return LongNetConfig.preset("tiny"), 2048


def measure(config: LongNetConfig, length: int, device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of every step by name, and how far loss and gradients differ.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = LongNetLM(config, device=device, dtype=dtype).train()
    wrapped = LongNetForCausalLM.from_longnet(plain).train()
    tokens = torch.randint(config.vocab_size, (1, length), device=device)
    targets = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)

    def in_transformers() -> Tensor:
        return wrapped(input_ids=tokens, labels=tokens).loss

    def alone() -> Tensor:
        return ForCausalLMLoss(logits=plain(tokens), labels=tokens, vocab_size=config.vocab_size)

    def with_its_own_loss() -> Tensor:
        return plain.loss(tokens, targets)

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            found = loss()
            found.backward()
            plain.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return found

        return run

    errors = _differences(plain, in_transformers, alone)
    # Twice, so that the noise of the ratio is known: the second plain one is the same thing.
    named = {
        "plain": alone,
        "transformers": in_transformers,
        "plain again": alone,
        "plain, own loss": with_its_own_loss,
    }
    calls = {name: step(loss) for name, loss in named.items()}
    seconds = interleave(calls, rounds, rounds, 0.0)
    return {"errors": errors, "seconds": seconds}


def _differences(plain: LongNetLM, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> dict[str, float]:
    found = []
    for loss_of in (first, second):
        value = loss_of()
        value.backward()
        grads = torch.cat([p.grad.double().flatten() for p in plain.parameters() if p.grad is not None])
        plain.zero_grad(set_to_none=True)
        found.append((float(value.detach()), grads))
    (given, gradients), (expected, expected_gradients) = found
    errors = {
        "loss": abs(given - expected) / abs(expected),
        "gradients": float((gradients - expected_gradients).norm() / expected_gradients.norm()),
    }
    if not max(errors.values()) < 1e-5:
        raise RuntimeError(f"longnet.hf computes something else than the plain model: {errors}")
    return errors


def run(out: Path | None) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    config, length = sizes(on_gpu)
    measured = measure(config, length, device)
    medians = {name: median(values) for name, values in measured["seconds"].items()}
    pairs = [a / b for a, b in zip(measured["seconds"]["transformers"], measured["seconds"]["plain"], strict=True)]
    ratio = medians["transformers"] / medians["plain"]
    result = {
        "kind": "hf",
        "commit": environment.commit(os.environ.get("LONGNET_COMMIT")),
        "versions": {**environment.versions(), "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name(device) if on_gpu else environment.device(),
        "config": config.to_dict(),
        "tokens": length,
        **measured,
        "ratio": ratio,
        "quartiles": quartiles(pairs),
        "noise": medians["plain again"] / medians["plain"],
        "limit": LIMIT,
    }
    print(f"a step of {length:,} tokens, {config.layers} layers, width {config.dim}, on {device.type}")
    for name, seconds in medians.items():
        print(f"{name:16} {seconds * 1e3:8.2f} ms")
    low, _, high = result["quartiles"]
    print(
        f"ratio {ratio:.3f} (quartiles of pairs {low:.3f} to {high:.3f}, the plain model's own {result['noise']:.3f})"
    )
    print(f"limit {LIMIT}: {'reached' if ratio <= LIMIT else 'missed'}")
    print("relative differences: " + ", ".join(f"{name} {x:.1e}" for name, x in measured["errors"].items()))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hf", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    run(parser.parse_args().out)


if __name__ == "__main__":
    main()
