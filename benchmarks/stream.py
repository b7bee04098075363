"""A language model that reads millions of bytes on the CPU: time and memory by tenth, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Reading
from benchmarks.environment import child_environment
from benchmarks.memory import reset_peak, resident

if TYPE_CHECKING:
    from longnet.models.cache import LongNetCache

_ROOT = Path(__file__).resolve().parents[1]
_PARTS = 10


def stream(reading: Reading) -> dict[str, Any]:
    """The record of :func:`probe`, made in a process of its own.

    Raises:
        RuntimeError: the process died; the message has its last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stream", json.dumps(asdict(reading))],
        cwd=_ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"reading {reading.tokens} tokens ended with code {done.returncode}:\n{last}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def probe(reading: Reading) -> dict[str, Any]:
    """Seconds and peak resident bytes of every tenth, logits of every byte included; then what keeping the cache costs."""
    import torch

    from longnet import LongNetConfig, LongNetLM

    config = LongNetConfig(
        vocab_size=256, dim=64, heads=4, layers=2, segment_lengths=reading.segment_lengths,
        dilation_rates=reading.dilation_rates, use_xpos=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    seconds, peaks = [], []
    with torch.inference_mode():
        model = LongNetLM(config).eval()
        cache = model.new_cache(1)
        finite = True
        for _ in range(_PARTS):
            reset_peak()
            start = time.perf_counter()
            for _ in range(reading.tokens // _PARTS // reading.chunk):
                tokens = torch.randint(256, (1, reading.chunk), generator=generator)
                finite &= bool(model(tokens, cache=cache)[0, -1].isfinite().all())
            seconds.append(time.perf_counter() - start)
            peaks.append(resident("VmHWM"))
    if not finite:
        raise RuntimeError("a logit is not finite")
    return {
        **asdict(reading),
        "read": cache.position,
        "cache_bytes": cache.nbytes,
        "seconds": seconds,
        "peak_bytes": peaks,
        "kept": _keep(cache),
    }


def _keep(cache: LongNetCache) -> dict[str, Any]:
    """Seconds of a copy, and of writing a cache to a file and going on from it."""
    from safetensors.torch import load_file, save_file

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    other = cache.clone()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        return {
            "clone_seconds": timed(cache.clone),
            "save_seconds": timed(lambda: save_file(cache.state_dict(), path)),
            "load_seconds": timed(lambda: other.load_state_dict(load_file(path))),
            "file_bytes": path.stat().st_size,
        }


def main() -> None:
    values: dict[str, Any] = json.loads(sys.argv[1])
    for name in ("segment_lengths", "dilation_rates"):
        values[name] = tuple(values[name])
    print(json.dumps(probe(Reading(**values))))


if __name__ == "__main__":
    main()
