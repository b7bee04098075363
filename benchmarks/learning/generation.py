"""What a stack keeps of a prompt, and how long it takes for the next token.

    python -m benchmarks.learning.generation --out generation.json

The models are those of ``equal_time`` with random weights, in bfloat16 on a GPU, one row. A token's time is that of a call of
``generate`` for many tokens less that of one for a single token, over the tokens between; the cache has room for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import report, results
from benchmarks.cases import Record
from benchmarks.device import Device, here
from benchmarks.learning import kinds
from benchmarks.learning.equal_time import STACKS, model_of
from benchmarks.waiting import one_by_one
from longnet import LongNetConfig, LongNetLM

CONTEXTS = (32_768, 131_072)
TOKENS, ROUNDS = 257, 5


def measure(stack: str, config: LongNetConfig, prompt: int, tokens: int, device: Device, rounds: int) -> Record:
    """Of one stack after a prompt."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    model = LongNetLM(config).to(device.device, dtype).eval()
    read = torch.randint(256, (1, prompt), device=device.device)
    calls = {str(count): lambda count=count: model.generate(read, count, temperature=0) for count in (1, tokens)}
    seconds = one_by_one(device, calls, rounds)
    each = [(many - one) / (tokens - 1) for one, many in zip(seconds["1"], seconds[str(tokens)], strict=True)]
    cache = model.new_cache(1, max_length=prompt + tokens).nbytes
    device.release()
    print(f"{stack} after {prompt:,}: {1e3 * median(each):.3f} ms a token, {cache / 2**20:.1f} MiB", flush=True)
    return {"stack": stack, "prompt": prompt, "first": seconds["1"], "token": each, "cache_bytes": cache}


def run(
    out: Path | None, contexts: Sequence[int], width: int = 512, tokens: int = TOKENS, rounds: int = ROUNDS
) -> Record:
    """Measure every stack at every context; what is measured is written at once."""
    device = here()
    result = results.started(kind="generation", device=device.describe(), tokens=tokens, rows=[])
    for context in contexts:
        for stack in STACKS:
            config = model_of(stack, context, dim=width)
            result["rows"].append(measure(stack, config, context, tokens, device, rounds))
            results.save(result, out)
    print(report.plain(result))
    return result


def main() -> None:
    parser = results.program("learning.generation", __doc__)
    parser.add_argument("--contexts", type=kinds.count, nargs="+", default=CONTEXTS, help="bytes of the prompt")
    options = parser.parse_args()
    run(options.out, options.contexts)


if __name__ == "__main__":
    main()
