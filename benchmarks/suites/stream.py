"""Streams with a bounded cache. On a GPU: their rows against the definition, and the time of a single token. On a CPU: a
language model that reads millions of bytes, its time and memory by tenth, in a fresh process."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import GPU, GPU_QUICK, Case, Record, draw
from benchmarks.checks import CheckFailed, as_json, rows_at_size
from benchmarks.device import Cpu, Device
from benchmarks.environment import in_child
from benchmarks.run import Run, Suite
from benchmarks.timing import host_seconds
from longnet import DilatedCache, LongNetConfig, LongNetLM, stream_attention

_PARTS = 10


@dataclass(frozen=True)
class Rows:
    """A sequence read in chunks, its last ``tail`` tokens one by one."""

    case: Case
    chunk: int
    tail: int

    @property
    def label(self) -> str:
        return f"N={self.case.length} in chunks of {self.chunk}, then {self.tail} single tokens"


@dataclass(frozen=True)
class Decoding:
    """Single tokens at several positions, and how they are timed."""

    case: Case
    positions: tuple[int, ...]
    dense_tokens: int
    layers: int
    rounds: int
    replays: int
    label: str = "single tokens, timed"


@dataclass(frozen=True)
class Reading:
    """A stream of tokens, a chunk at a time, read by a small model of this pattern."""

    tokens: int
    chunk: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.tokens} tokens"


CELLS: dict[str, tuple[Rows | Decoding | Reading, ...]] = {
    "cpu": (Reading(10_000_000, 8000, (256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256)),),
    "cpu-quick": (Reading(4000, 100, (32, 64), (1, 2)),),
    "cuda": (
        Rows(GPU, 65536, 0),
        Rows(replace(GPU, length=262144), 65536, 128),
        # 100,007,936 is the first multiple of the period past 100 million.
        Decoding(GPU, (65536, 100007936), dense_tokens=65536, layers=8, rounds=16, replays=32),
    ),
    "cuda-quick": (
        Rows(GPU_QUICK, 100, 0),
        Rows(replace(GPU_QUICK, length=300), 100, 5),
        Decoding(GPU_QUICK, (256, 2560), dense_tokens=64, layers=2, rounds=2, replays=3),
    ),
}


def measure(run: Run, cell: Rows | Decoding | Reading) -> Record:
    """Raises :class:`CheckFailed` for a row further from the definition, or from its twin, than allowed."""
    if isinstance(cell, Reading):
        return in_child(_read, cell)
    return _rows(run.device, cell) if isinstance(cell, Rows) else _decode(run.device, cell)


def _rows(device: Device, cell: Rows) -> Record:
    """Random rows of what was read one by one, or in chunks where nothing was."""
    case, tail = cell.case, cell.tail
    tensors = draw(case, 0, device.device)
    cache, out = _cache(case, device.device), torch.empty_like(tensors.query)
    whole = case.length - tail
    cuts = [*range(0, whole, cell.chunk), *range(whole, case.length), case.length]
    for start, stop in pairwise(cuts):
        query, key, value = (x[:, :, start:stop] for x in tensors.inputs)
        out[:, :, start:stop] = stream_attention(query, key, value, cache)
    checks = rows_at_size(case, tensors, out, first=whole if tail else 0)
    return {
        "case": case.to_dict(), "pass": "single tokens" if tail else "chunks", "chunk": cell.chunk, "tail": tail,
        "cache_bytes": cache.nbytes, "checks": as_json(checks),
    }  # fmt: skip


def _decode(device: Device, cell: Decoding) -> Record:
    """Seconds a token and layer of a captured step at several positions, and of dense decoding, in turn.

    A step reads as many rows as its segments hold by then, so positions compare at the same phase of the pattern: every
    round has another phase, and all positions are multiples of the period away from it.
    """
    case, positions = cell.case, cell.positions
    if odd := [position for position in positions if position % case.pattern.period]:
        raise ValueError(f"positions {odd} are no multiples of the pattern's period {case.pattern.period}")
    layers = [_Layer(case, device.device, number) for number in range(cell.layers)]
    step = device.capture(lambda: [layer.step() for layer in layers])
    dense = device.capture(_dense(device, cell))
    chosen = random.Random(0)
    phases = [chosen.randrange(case.pattern.period - cell.replays) for _ in range(cell.rounds)]
    seconds: dict[str, list[float]] = {name: [] for name in (*map(str, positions), "dense")}
    for phase in phases:
        outs = []
        for position in positions:
            for layer in layers:
                layer.cache.moved(position + phase - layer.cache.position)
            seconds[str(position)].append(_seconds(device, step, cell))
            outs.append(layers[0].out.clone())
        seconds["dense"].append(_seconds(device, dense, cell))
        for out, position in zip(outs[1:], positions[1:], strict=True):
            if not torch.equal(out, outs[0]):
                raise CheckFailed(f"the token at {position + phase} differs from that at {positions[0] + phase}")
    return {
        "case": case.to_dict(), "pass": "decode", "layers": cell.layers, "replays": cell.replays,
        "positions": list(positions), "phases": phases, "dense_tokens": cell.dense_tokens,
        "dense_bytes": 2 * replace(case, length=cell.dense_tokens).tensor_bytes,
        "cache_bytes": layers[0].cache.nbytes, "seconds": seconds, "checks": [],
    }  # fmt: skip


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

    def step(self) -> Tensor:
        query, key, value = self.token
        return self.out.copy_(stream_attention(query, key, value, self.cache))


def _cache(case: Case, device: torch.device) -> DilatedCache:
    return DilatedCache(
        case.segment_lengths, case.dilation_rates, batch_size=case.batch, heads=case.heads, head_dim=case.head_dim,
        dtype=case.torch_dtype, device=device,
    )  # fmt: skip


def _dense(device: Device, cell: Decoding) -> Callable[[], list[Tensor]]:
    """Dense decoding, every layer with ``cell.dense_tokens`` cached tokens of its own."""
    case = cell.case
    generator = torch.Generator(device.device).manual_seed(0)

    def normal(tokens: int) -> Tensor:
        shape = (case.batch, case.heads, tokens, case.head_dim)
        return torch.randn(shape, generator=generator, device=device.device).to(case.torch_dtype)

    query = normal(1)
    cached = [(normal(cell.dense_tokens), normal(cell.dense_tokens)) for _ in range(cell.layers)]
    return lambda: [F.scaled_dot_product_attention(query, key, value) for key, value in cached]


def _seconds(device: Device, step: Callable[[], object], cell: Decoding) -> float:
    """Seconds a step and layer."""
    step()
    device.occupy()
    start = device.start()
    for _ in range(cell.replays - 1):
        step()
    stop = device.stop()
    device.finish()
    return device.seconds(start, stop) / (cell.replays - 1) / cell.layers


def _read(reading: Reading) -> Record:
    """Seconds and peak resident bytes of every tenth, logits of every byte included; then the cost of a copy of the cache."""
    from safetensors.torch import load_file, save_file

    config = LongNetConfig(
        vocab_size=256, dim=64, heads=4, layers=2, segment_lengths=reading.segment_lengths,
        dilation_rates=reading.dilation_rates, use_xpos=True,
    )  # fmt: skip
    generator, device, finite = torch.Generator().manual_seed(0), Cpu(), True
    seconds, peaks = [], []
    with torch.inference_mode():
        model = LongNetLM(config).eval()
        cache = model.new_cache(1)

        def read() -> None:
            nonlocal finite
            for _ in range(reading.tokens // _PARTS // reading.chunk):
                tokens = torch.randint(256, (1, reading.chunk), generator=generator)
                finite &= bool(model(tokens, cache=cache)[0, -1].isfinite().all())

        for _ in range(_PARTS):
            device.reset_peak()
            seconds.append(host_seconds(device, read))
            peaks.append(device.peak())
    if not finite:
        raise RuntimeError("a logit is not finite")
    other = cache.clone()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        prefix = {
            "clone_seconds": host_seconds(device, cache.clone),
            "save_seconds": host_seconds(device, lambda: save_file(cache.state_dict(), path)),
            "load_seconds": host_seconds(device, lambda: other.load_state_dict(load_file(path))),
            "file_bytes": path.stat().st_size,
        }
    memory = {"cache_bytes": cache.nbytes, "peak_bytes": peaks}
    return asdict(reading) | memory | {"read": cache.position, "seconds": seconds, "kept": prefix}


# On a CPU the growth of the peak memory from the second tenth to the last, at most. "position": time of a token at the last
# position over the first, less 1, at most. "dense_decoding": time of a dense decoding step over ours, at least.
LIMITS: dict[str, dict[str, Any]] = {
    "cpu": {"stream": 0.02},
    "cuda": {"stream": {"position": 0.05, "dense_decoding": 4.0}},
}
SUITE = Suite("stream", CELLS, measure, LIMITS)
