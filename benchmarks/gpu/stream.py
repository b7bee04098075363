"""Streams with a bounded cache: their rows against the definition, and the time of a single token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, draw
from benchmarks.checks import CheckFailed, allowed_at_size, rows_at_size
from benchmarks.gpu.cases import StreamSizes
from benchmarks.gpu.machine import Machine
from longnet import DilatedCache, stream_attention


def stream_rows(machine: Machine, case: Case, chunk: int, tail: int) -> dict[str, Any]:
    """A sequence read in chunks, its last ``tail`` tokens one by one: random rows of what was read that way.

    Raises:
        CheckFailed: a row further from the definition than its dtype allows.
    """
    tensors = draw(case, 0, machine.device)
    cache, out = _cache(case, machine.device), torch.empty_like(tensors.query)
    whole = case.length - tail
    cuts = [*range(0, whole, chunk), *range(whole, case.length), case.length]
    for start, stop in pairwise(cuts):
        query, key, value = (x[:, :, start:stop] for x in tensors.all[:3])
        out[:, :, start:stop] = stream_attention(query, key, value, cache)
    checks = rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0], first=whole if tail else 0)
    return {
        "case": case.to_dict(),
        "pass": "single tokens" if tail else "chunks",
        "chunk": chunk,
        "tail": tail,
        "cache_bytes": cache.nbytes,
        "checks": [asdict(check) for check in checks],
    }


def decode(machine: Machine, case: Case, sizes: StreamSizes) -> dict[str, Any]:
    """Seconds a token and layer of a captured step at several positions, and of dense decoding, in turn.

    A step reads as many rows as its segments hold by then, so positions compare at the same phase of the pattern: every
    round has another phase, and all positions are multiples of the period away from it.

    Raises:
        CheckFailed: positions of one phase whose rows differ by a bit.
    """
    for position in sizes.positions:
        if position % case.pattern.period:
            raise ValueError(f"position {position} is no multiple of the pattern's period {case.pattern.period}")
    layers = [_Layer(case, machine.device, number) for number in range(sizes.layers)]
    step = machine.capture(lambda: [layer.step() for layer in layers])
    dense = machine.capture(_dense(machine, case, sizes))
    chosen = random.Random(0)
    phases = [chosen.randrange(case.pattern.period - sizes.replays) for _ in range(sizes.rounds)]
    seconds: dict[str, list[float]] = {name: [] for name in (*map(str, sizes.positions), "dense")}
    for phase in phases:
        outs = []
        for position in sizes.positions:
            for layer in layers:
                layer.stand(position + phase)
            seconds[str(position)].append(_timed(machine, step, sizes) / sizes.layers)
            outs.append(layers[0].out.clone())
        seconds["dense"].append(_timed(machine, dense, sizes) / sizes.layers)
        for out, position in zip(outs[1:], sizes.positions[1:], strict=True):
            if not torch.equal(out, outs[0]):
                raise CheckFailed(f"the token at {position + phase} differs from that at {sizes.positions[0] + phase}")
    return {
        "case": case.to_dict(),
        "pass": "decode",
        "layers": sizes.layers,
        "replays": sizes.replays,
        "positions": list(sizes.positions),
        "phases": phases,
        "dense_tokens": sizes.dense_tokens,
        "dense_bytes": 2 * case.batch * case.heads * sizes.dense_tokens * case.head_dim * case.torch_dtype.itemsize,
        "cache_bytes": layers[0].cache.nbytes,
        "seconds": seconds,
        "checks": [],
    }


class _Layer:
    """A layer's cache, full of random rows, and its next token."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.cache = _cache(case, device)
        for x in (self.cache.keys, self.cache.values):
            x.normal_(generator=generator)
        shape = (case.batch, case.heads, 1, case.head_dim)
        self.token = [torch.randn(shape, generator=generator, device=device).to(case.torch_dtype) for _ in range(3)]
        self.out = torch.empty_like(self.token[0])

    def stand(self, position: int) -> None:
        self.cache.moved(position - self.cache.position)

    def step(self) -> Tensor:
        query, key, value = self.token
        return self.out.copy_(stream_attention(query, key, value, self.cache))


def _cache(case: Case, device: torch.device) -> DilatedCache:
    return DilatedCache(
        case.segment_lengths,
        case.dilation_rates,
        batch_size=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=case.torch_dtype,
        device=device,
    )


def _dense(machine: Machine, case: Case, sizes: StreamSizes) -> Callable[[], list[Tensor]]:
    """Dense decoding with so many tokens cached, every layer its own."""
    shape = (case.batch, case.heads, sizes.dense_tokens, case.head_dim)
    generator = torch.Generator(machine.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=machine.device).to(case.torch_dtype)

    query = normal(case.batch, case.heads, 1, case.head_dim)
    cached = [(normal(*shape), normal(*shape)) for _ in range(sizes.layers)]
    return lambda: [F.scaled_dot_product_attention(query, key, value) for key, value in cached]


def _timed(machine: Machine, step: Callable[[], object], sizes: StreamSizes) -> float:
    """Seconds a call."""
    step()
    machine.occupy()
    start = machine.mark()
    for _ in range(sizes.replays - 1):
        step()
    stop = machine.mark()
    machine.finish()
    return machine.seconds(start, stop) / (sizes.replays - 1)
