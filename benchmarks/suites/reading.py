"""A language model that reads millions of bytes on the CPU: time and memory by tenth, in a fresh process."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cases import Record
from benchmarks.device import Cpu
from benchmarks.environment import in_child
from benchmarks.run import Run, Suite
from benchmarks.timing import host_seconds

_PARTS = 10


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


CELLS = {
    "cpu": (Reading(10_000_000, 8000, (256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256)),),
    "cpu-quick": (Reading(4000, 100, (32, 64), (1, 2)),),
}


def measure(run: Run, reading: Reading) -> Record:
    return in_child(probe, reading)


def probe(reading: Reading) -> Record:
    """Seconds and peak resident bytes of every tenth, logits of every byte included; then the cost of a copy of the cache."""
    import torch
    from safetensors.torch import load_file, save_file

    from longnet import LongNetConfig, LongNetLM

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


# Growth of the peak memory from the second tenth to the last, at most.
SUITE = Suite("stream", CELLS, measure, {"cpu": {"stream": 0.02}})
