"""What people wait for besides kernels: short calls, training steps, tokens, the first call, another length.

    python -m benchmarks.waiting --out waiting.json

Seconds are the host's, from a call until the device has finished; long calls are timed on the device. Dense attention, and in
the compiled stack FlexAttention with a window of as many keys, are timed in the same run. ``--only`` names sections.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import checks, results
from benchmarks.cases import PASSES, Case, Record, Tensors, draw
from benchmarks.device import Device, here
from benchmarks.timing import contender, host_seconds, interleave, ours
from longnet import LongNetConfig, LongNetLM, dilated_attention
from longnet.hf import LongNetForCausalLM

PAPER = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
SHORT = ((512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16))
# In turn.
TYPES = {"layer_types": ("sliding_attention", "strided_attention"), "sliding_window": 512, "stride": 4}


@dataclass(frozen=True)
class Sizes:
    """How large everything is; ``compiler`` is torch's, by name, None for none."""

    tokens: int = 8192
    long: int = 131_072
    heads: int = 16
    dims: tuple[int, ...] = (64, 128)
    dtype: torch.dtype = torch.bfloat16
    layers: int = 8
    width: int = 512
    batch: int = 4
    preset: str = "base"
    steps: tuple[tuple[int, int], ...] = ((16, 2048), (4, 8192), (1, 32_768))
    longest: int = 1_048_576
    prompt: int = 512
    long_prompt: int = 32_768
    new_tokens: int = 512
    calls: int = 200
    rounds: int = 11
    repeats: int = 20
    compiler: str | None = "inductor"


SMALL = Sizes(
    tokens=64, long=256, heads=4, dims=(16,), dtype=torch.float32, layers=2, width=32, batch=2, preset="nano",
    steps=((2, 64), (1, 128), (1, 256)), longest=512, prompt=20, long_prompt=70, new_tokens=8, calls=3, rounds=2, repeats=3,
    compiler="eager",
)  # fmt: skip


def row(
    name: str, seconds: dict[str, list[float]], limit: float | None, beside: str | None = None, **more: Any
) -> Record:
    """A result. ``limit``: of our seconds, or of their ratio to those of ``beside`` where it is named."""
    value = median(seconds["ours"])
    if beside is not None:
        value = median(a / b for a, b in zip(seconds["ours"], seconds[beside], strict=True))
    shown = ", ".join(f"{one} {1e3 * median(each):.3f} ms" for one, each in seconds.items())
    against = "" if limit is None else f" (limit {limit:g}{'' if beside is None else f' of {beside}'})"
    print(f"{name}: {shown}; {value:.4g}{against}", flush=True)
    return {"name": name, "seconds": seconds, "beside": beside, "value": value, "limit": limit, **more}


def one_by_one(device: Device, calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn: the device is idle before, and has finished after."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 3):
        for name, call in calls.items():
            found[name] += [host_seconds(device, call)] * (number > 2)
    return found


def case_of(sizes: Sizes, tokens: int, dim: int) -> Case:
    return Case(tokens, str(sizes.dtype).removeprefix("torch."), sizes.heads, dim, *PAPER)


def calls(sizes: Sizes, device: Device) -> Iterator[Record]:
    """A call from Python, after a short one has been compared with the definition."""
    case = case_of(sizes, sizes.tokens, sizes.dims[0])
    checks.small_against_oracle(replace(case, length=min(700, case.length)), device.device, ("portable",))
    tensors = draw(case, 0, device.device)
    both = ours(case, tensors), contender("dense", checks.attend_dense(case.is_causal), tensors)
    for which, limit in (("forward", 0.30e-3), ("forward_backward", 0.95e-3)):
        passes = {one.name: one.passes[which] for one in both}
        yield row(f"call, {which}", one_by_one(device, passes, sizes.calls), limit)
        many = {
            name: [host_seconds(device, one, sizes.repeats) for _ in range(sizes.rounds)]
            for name, one in passes.items()
        }
        yield row(f"calls back to back, {which}", many, None)


def long_calls(sizes: Sizes, device: Device) -> Iterator[Record]:
    """A padding mask, and the general kernels beside those for Hopper GPUs."""
    for dim in sizes.dims:
        case = case_of(sizes, sizes.long, dim)
        tensors = draw(case, 0, device.device)
        after = torch.zeros(1, sizes.long, dtype=torch.bool, device=device.device)
        after[:, -sizes.long // 16 :] = True
        masks = {"a padding mask": after, "scattered padding": torch.rand_like(after, dtype=torch.float32) < 1 / 16}

        def compared(
            tensors: Tensors = tensors, **attends: checks.Attend
        ) -> Iterator[tuple[str, dict[str, list[float]]]]:
            for which in PASSES:
                timed = {name: contender(name, attend, tensors).passes[which] for name, attend in attends.items()}
                yield which, interleave(device, timed, sizes.rounds, sizes.rounds)

        attend = checks.attend_dilated(case)
        for name, mask in masks.items():
            for which, seconds in compared(ours=partial(attend, key_padding_mask=mask), without=attend):
                yield row(f"{name}, D={dim}, {which}", seconds, 1.1, "without")
        if device.kind == "cuda":
            general, hopper = (checks.attend_dilated(case, f"triton:{kind}") for kind in ("general", "hopper"))
            for which, seconds in compared(ours=general, Hopper=hopper):
                yield row(f"general kernels, D={dim}, {which}", seconds, 1.15 if dim == 64 else 1.25, "Hopper")


class Block(nn.Module):
    """A pre-norm block whose attention is given, (B, H, N, D) three times to one."""

    def __init__(self, width: int, heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def stack(sizes: Sizes, device: Device, attend: Callable[..., Tensor]) -> Callable[[], object]:
    """A compiled training step over bytes, without the optimizer."""
    torch.manual_seed(0)
    heads = sizes.width // 64 or 2
    blocks = nn.Sequential(
        nn.Embedding(256, sizes.width),
        *(Block(sizes.width, heads, attend) for _ in range(sizes.layers)),
        nn.RMSNorm(sizes.width),
        nn.Linear(sizes.width, 256, bias=False),
    ).to(device.device)
    compiled = blocks if sizes.compiler is None else torch.compile(blocks, backend=sizes.compiler)
    ids = torch.randint(256, (sizes.batch, sizes.tokens + 1), device=device.device)

    def step() -> None:
        with torch.autocast(device.kind, torch.bfloat16, enabled=sizes.dtype == torch.bfloat16):
            logits = compiled(ids[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        blocks.zero_grad(set_to_none=True)

    return step


def stacks(sizes: Sizes, device: Device) -> Iterator[Record]:
    """The operation inside of a compiled model, beside dense attention and a window of as many keys."""

    def dilated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dilated_attention(query, key, value, *SHORT, is_causal=True)

    made = {"ours": stack(sizes, device, dilated), "dense": stack(sizes, device, checks.attend_dense(True))}
    if device.kind == "cuda":
        window = lambda b, h, q, k: (q >= k) & (q - k < 496)  # noqa: E731
        mask = create_block_mask(window, None, None, sizes.tokens, sizes.tokens, device=str(device.device))
        made["flex"] = stack(
            sizes, device, lambda query, key, value: flex_attention(query, key, value, block_mask=mask)
        )
    # On the H100 of the first measurements dense took 39.9 ms, and 31 was to be reached.
    yield row("step of 8 layers, compiled", one_by_one(device, made, sizes.rounds), 31 / 39.9, "dense")


def model_step(
    sizes: Sizes, device: Device, batch: int, length: int, compiled: str, **changes: Any
) -> Callable[[], object]:
    """A whole training step of a model. ``compiled``: ``"whole"``, ``"blocks"``, or neither."""
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset(sizes.preset, "longnet", qk_norm=False, **changes)).to(device.device)
    loss: Callable[..., Tensor] = model.loss
    if sizes.compiler is not None:
        # What was compiled before would count against the limit of graphs of one function.
        torch.compiler.reset()
        if compiled == "whole":
            loss = torch.compile(model.loss, backend=sizes.compiler)
        elif compiled == "blocks":
            for block in model.blocks:
                block.compile(fullgraph=True, backend=sizes.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.kind == "cuda")
    ids = torch.randint(256, (batch, length + 1), device=device.device)

    def step() -> None:
        with torch.autocast(device.kind, torch.bfloat16, enabled=sizes.dtype == torch.bfloat16):
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps_of(device: Device, step: Callable[[], object], count: int) -> dict[str, list[float]]:
    """Seconds of a step of several one after the other, as training runs them; and of one that is waited for."""
    alone = one_by_one(device, {"one alone": step}, count)
    return {"ours": [host_seconds(device, step, 5) for _ in range(-(-count // 3))], **alone}


def model_steps(place: int, sizes: Sizes, device: Device) -> Iterator[Record]:
    """Training steps of the base model, compiled as ``longnet train`` does it, as a whole and not at all.

    Args:
        place: of the step in ``sizes.steps``: to compile takes minutes, so each is a section of its own.
    """
    batch, length = sizes.steps[place]
    # Tokens a second, published and with windows and strides in turn.
    wanted = {2048: (620e3, None), 8192: (600e3, 620e3), 32_768: (520e3, 440e3)}
    kinds: list[tuple[str, dict[str, Any]]] = [("published", {}), ("types in turn", TYPES)]
    for (kind, changes), speed in zip(kinds, wanted.get(length, (None, None)), strict=True):
        for compiled in ("blocks", "whole", "not"):
            step = model_step(sizes, device, batch, length, compiled, **changes)
            began = time.perf_counter()
            step()
            device.finish()
            first = time.perf_counter() - began
            seconds = steps_of(device, step, sizes.rounds)
            limit = batch * length / speed if speed and compiled != "not" else None
            tokens = batch * length / median(seconds["ours"])
            name = f"training step, {batch} x {length:,}, {kind}, compiled: {compiled}"
            yield row(name, seconds, limit, first_seconds=first, tokens_per_second=tokens)
            del step
            device.release()


def longest_step(sizes: Sizes, device: Device) -> Iterator[Record]:
    """A training step over one long sequence, blocks recomputed in the backward pass."""
    step = model_step(sizes, device, 1, sizes.longest, "blocks", gradient_checkpointing=True)
    # Seconds each: few are enough.
    seconds = steps_of(device, step, 3)
    tokens = sizes.longest / median(seconds["ours"])
    name = f"training step, 1 x {sizes.longest:,}, published, recomputed, compiled: blocks"
    yield row(name, seconds, sizes.longest / 350e3, tokens_per_second=tokens)


def generation(sizes: Sizes, device: Device) -> Iterator[Record]:
    """A token, the first one after a long prompt, and calls of lengths that were not seen before."""
    for kind, changes in (("published", {}), ("types in turn", TYPES)):
        torch.manual_seed(0)
        model = (
            LongNetLM(LongNetConfig.preset(sizes.preset, "longnet", qk_norm=False, **changes))
            .to(device.device, sizes.dtype)
            .eval()
        )

        def generate(length: int, count: int, model: LongNetLM = model) -> Callable[[], object]:
            prompt = torch.randint(256, (1, length), device=device.device)
            return lambda: model.generate(prompt, count, temperature=0)

        count = sizes.new_tokens
        began = time.perf_counter()
        generate(sizes.prompt, count)()
        device.finish()
        yield row(f"generate, first call of a model, {kind}", {"ours": [time.perf_counter() - began]}, None)
        seen = {"one": generate(sizes.prompt, 1), "ours": generate(sizes.prompt, count)}
        seconds = one_by_one(device, seen, sizes.rounds)
        each = [(a - b) / (count - 1) for a, b in zip(seconds["ours"], seconds["one"], strict=True)]
        yield row(f"generate, a token, {kind}", {"ours": each}, 0.7e-3)
        generate(sizes.long_prompt, 1)()
        first = one_by_one(device, {"ours": generate(sizes.long_prompt, 1)}, sizes.rounds)
        yield row(f"generate, the first token after {sizes.long_prompt:,}, {kind}", first, 25e-3)
        expected = median(seconds["one"]) + count * median(each)
        for length in (sizes.prompt + 265, sizes.prompt // 3):
            unseen = host_seconds(device, generate(length, count + 5)) - expected
            yield row(f"generate, beyond its tokens, a new length of {length}, {kind}", {"ours": [unseen]}, 0.1)
        adapted = LongNetForCausalLM.from_longnet(model)

        def by_transformers(count: int, adapted: LongNetForCausalLM = adapted) -> Callable[[], object]:
            prompt = torch.randint(256, (1, sizes.prompt), device=device.device)
            options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
            return lambda: adapted.generate(prompt, cache_implementation="static", **options)

        # The first call compiles for the cache's length.
        by_transformers(count)()
        seconds = one_by_one(device, {"one": by_transformers(1), "ours": by_transformers(count)}, sizes.rounds)
        each = [(a - b) / (count - 1) for a, b in zip(seconds["ours"], seconds["one"], strict=True)]
        yield row(f"generate of transformers, a token, {kind}", {"ours": each}, None)
        del model, adapted
        device.release()


_FIRST_USE = """
import sys, time, torch
from longnet import dilated_attention
lengths, rates = {pattern}
for tokens in {tokens}:
    q, k, v = (torch.randn(1, {heads}, tokens, 64, device={device!r}, dtype={dtype}, requires_grad=True) for _ in range(3))
    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    wait()
    marks = [time.perf_counter()]
    out = dilated_attention(q, k, v, lengths, rates, is_causal=True)
    wait(); marks.append(time.perf_counter())
    out.sum().backward()
    wait(); marks.append(time.perf_counter())
    print(tokens, marks[1] - marks[0], marks[2] - marks[1])
"""


def first_use(sizes: Sizes, device: Device) -> Iterator[Record]:
    """The first call of a pattern in a process, with nothing on disk and with kernels there; then of shorter lengths."""
    tokens = (sizes.long, sizes.long // 4, sizes.long // 11)
    source = _FIRST_USE.format(
        pattern=PAPER, tokens=tokens, heads=sizes.heads, device=device.kind, dtype=str(sizes.dtype)
    )
    with tempfile.TemporaryDirectory() as folder:
        for where, limits in (("nothing on disk", (8.0, 0.1, 0.1)), ("kernels on disk", (1.0, 0.1, 0.1))):
            ran = subprocess.run(
                [sys.executable, "-c", source],
                env={**os.environ, "TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            for line, limit in zip(ran.stdout.splitlines(), limits, strict=True):
                length, forward, backward = line.split()
                both = {
                    "ours": [float(forward) + float(backward)],
                    "forward": [float(forward)],
                    "backward": [float(backward)],
                }
                yield row(f"first call of {int(length):,} tokens in a process, {where}", both, limit)


SECTIONS: dict[str, Callable[[Sizes, Device], Iterator[Record]]] = {
    **{one.__name__: one for one in (calls, long_calls, stacks, generation, first_use)},
    **{f"model_steps_{number + 1}": partial(model_steps, number) for number in range(len(Sizes.steps))},
    "longest_step": longest_step,
}


def run(out: Path | None, only: list[str], sizes: Sizes | None = None) -> Record:
    """Measure the sections that are named, all if none is; what ``out`` holds of others stays.

    Raises:
        NoResult: ``out`` is another benchmark's, or of other sources, versions or another device.
    """
    device = here()
    sizes = sizes or (Sizes() if device.kind == "cuda" else SMALL)
    result = results.started(kind="waiting", device=device.describe(), rows=[])
    if out is not None and out.exists():
        result = results.continued(out, result)
    for name in only or SECTIONS:
        result["rows"] = [one for one in result["rows"] if one["section"] != name]
        for record in SECTIONS[name](sizes, device):
            result["rows"].append({"section": name, **record})
            results.save(result, out)
        device.release()
    return result


def main() -> None:
    options = results.program("waiting", __doc__)
    options.add_argument("--only", nargs="*", default=[], choices=list(SECTIONS), help="sections; all by default")
    given = options.parse_args()
    try:
        run(given.out, given.only)
    except results.NoResult as error:
        options.error(str(error))


if __name__ == "__main__":
    main()
