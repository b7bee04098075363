"""The overhead of the Hugging Face model: a training step of longnet.hf.LongNetForCausalLM against the plain LongNetLM.

    python -m benchmarks.hf --out hf.json

Both have the same parameters. Loss and gradients are compared first; then rounds time in turn forward and backward of each, the
plain one with the same loss function on its logits, and, for information, with its own loss, which holds fewer logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks import checks, report, results
from benchmarks.cases import Record
from benchmarks.device import HostClock, here
from benchmarks.timing import interleave, quartiles
from longnet import LongNetConfig, LongNetLM
from longnet.hf import LongNetForCausalLM

# Time of a step in transformers' form over the plain model's.
LIMIT, ROUNDS, ALLOWED = 1.03, 31, 1e-5


def sizes(on_gpu: bool) -> tuple[LongNetConfig, int]:
    """The model, and the tokens of a step."""
    return (LongNetConfig(), 32768) if on_gpu else (LongNetConfig.preset("tiny", "longnet"), 2048)


def measure(config: LongNetConfig, length: int, device: torch.device, rounds: int = ROUNDS) -> Record:
    """Seconds of every step by name, and how far loss and gradients differ.

    Raises:
        CheckFailed: they differ by more than rounding.
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

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            value = loss()
            value.backward()
            plain.zero_grad(set_to_none=True)
            return value

        return run

    errors = _differences(plain, in_transformers, alone)
    calls = {
        "plain": step(alone),
        "transformers": step(in_transformers),
        # Twice, so that the noise of the ratio is known.
        "plain again": step(alone),
        "plain, own loss": step(lambda: plain.loss(tokens, targets)),
    }
    return {"errors": errors, "seconds": interleave(HostClock(device), calls, rounds, rounds)}


def _differences(plain: LongNetLM, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> dict[str, float]:
    both = []
    for loss_of in (first, second):
        value = loss_of()
        value.backward()
        grads = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
        plain.zero_grad(set_to_none=True)
        both.append((value, grads))
    (loss, grads), (expected_loss, expected_grads) = both
    pairs = {"loss": (loss, expected_loss), "gradients": (grads, expected_grads)}
    errors = {name: checks.relative_error(*pair) for name, pair in pairs.items()}
    return checks.require("longnet.hf computes something else than the plain model", errors, ALLOWED)


def run(out: Path | None) -> Record:
    device = here()
    config, length = sizes(device.kind == "cuda")
    measured = measure(config, length, device.device)
    seconds = {name: median(values) for name, values in measured["seconds"].items()}
    pairs = [a / b for a, b in zip(measured["seconds"]["transformers"], measured["seconds"]["plain"], strict=True)]
    result = results.started(kind="hf", device=device.describe(), config=config.to_dict(), tokens=length, **measured)
    result["versions"]["transformers"] = transformers.__version__
    result |= {
        "ratio": seconds["transformers"] / seconds["plain"],
        "quartiles": quartiles(pairs),
        "noise": seconds["plain again"] / seconds["plain"],
        "limit": LIMIT,
    }
    print(report.plain(result))
    results.save(result, out)
    return result


def main() -> None:
    run(results.program("hf", __doc__).parse_args().out)


if __name__ == "__main__":
    main()
