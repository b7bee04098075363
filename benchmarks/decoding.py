"""One token of a stream with a window and strided keys, beside dense decoding over as many cached tokens.

    python -m benchmarks.decoding --out decoding.json

The cache has its capacity from the start. Dense decoding is ``F.scaled_dot_product_attention`` over a cache of fixed size, the
faster of its two spellings where key/value heads are shared. Both are captured as a graph where the device has graphs. The end of
a short stream is compared with the definition before anything is timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks, results
from benchmarks.cases import Record
from benchmarks.device import Device, here
from benchmarks.timing import interleave, repeated
from longnet import DilatedCache, stream_attention

LIMITS = {"seconds": 0.35, "bytes": 0.27}
ROUNDS, ALLOWED = 21, 2e-2


@dataclass(frozen=True)
class Row:
    """One comparison. ``calls``: replays that are timed as one, as a token is short."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int = 32_768
    window: int = 512
    stride: int = 4
    calls: int = 50
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def kind(self) -> dict[str, Any]:
        offsets = "interleaved" if self.heads == self.kv_heads else "grouped"
        return {"window": self.window, "dilated_queries": False, "head_offsets": offsets}

    def cache(self, batch: int, capacity: int, device: torch.device) -> DilatedCache:
        sizes: dict[str, Any] = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        sizes["dtype"] = self.torch_dtype
        return DilatedCache(None, self.stride, batch_size=batch, device=device, capacity=capacity, **sizes, **self.kind)

    def draw(self, batch: int, tokens: int, device: torch.device) -> list[Tensor]:
        """Random queries, keys and values."""
        shapes = [(batch, heads, tokens, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return [torch.randn(shape, device=device, dtype=self.torch_dtype) for shape in shapes]


def rows(on_gpu: bool) -> list[Row]:
    if not on_gpu:
        return [Row(2, 4, kv, 16, tokens=256, window=16, calls=1, dtype="float32") for kv in (4, 1)]
    sizes = ((16, 16, 64), (16, 4, 64), (16, 16, 128), (32, 8, 128))
    return [Row(batch, *size) for batch in (16, 1) for size in sizes]


def check(row: Row, device: Device) -> float:
    """How far the last tokens of a short stream are from the definition.

    Raises:
        CheckFailed: by more than rounding.
    """
    tokens, last = 600, 8
    q, k, v = row.draw(2, tokens, device.device)
    cache = row.cache(2, tokens, device.device)

    def read(start: int, stop: int) -> Tensor:
        return stream_attention(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], cache)

    read(0, tokens - last)
    found = [read(at, at + 1) for at in range(tokens - last, tokens)]
    exact = [x.double().cpu() for x in (q, k, v)]
    kind: dict[str, Any] = {"segment_lengths": (None,), "dilation_rates": (row.stride,), **row.kind}
    expected, _ = checks.oracle().dense_attention(*exact, **kind, is_causal=True)
    error = checks.relative_error(torch.cat(found, 2).cpu(), expected[:, :, -last:])
    return checks.require(f"{row}", {"out": error}, ALLOWED)["out"]


def measure(row: Row, device: Device, rounds: int = ROUNDS) -> Record:
    """Seconds of a token, ours and dense, and bytes of both caches."""
    record: Record = {"case": asdict(row), "error": check(row, device)}
    # Replays go on past the cached tokens: room for them all.
    room = row.calls * (rounds + 8)
    cache = row.cache(row.batch, row.tokens + room, device.device)
    for stored in (cache.keys, cache.values):
        stored.normal_()
    cache.moved(row.tokens)
    q, k, v = row.draw(row.batch, 1, device.device)
    _, keys, values = row.draw(row.batch, row.tokens, device.device)
    contenders = {"ours": lambda: stream_attention(q, k, v, cache)}
    if row.heads == row.kv_heads:
        contenders["dense"] = lambda: F.scaled_dot_product_attention(q, keys, values)
    else:
        # Query heads of a key/value head as rows of one product.
        grouped = q.view(row.batch, row.kv_heads, -1, row.head_dim)
        contenders["dense"] = lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        contenders["dense, grouped"] = lambda: F.scaled_dot_product_attention(grouped, keys, values)
    captured = {name: repeated(device.capture(one), row.calls) for name, one in contenders.items()}
    seconds = interleave(device, captured, rounds, rounds)
    seconds = {name: [one / row.calls for one in values] for name, values in seconds.items()}
    other = min((name for name in seconds if name != "ours"), key=lambda name: median(seconds[name]))
    ratio = median(a / b for a, b in zip(seconds["ours"], seconds[other], strict=True))
    exact = row.cache(row.batch, row.tokens, device.device).nbytes
    record |= {"seconds": {"ours": seconds["ours"], "dense": seconds[other]}, "ratio": ratio}
    record |= {"bytes": exact, "dense_bytes": keys.nbytes + values.nbytes, "limits": LIMITS}
    us = {name: 1e6 * median(record["seconds"][name]) for name in ("ours", "dense")}
    print(
        f"B={row.batch} H={row.heads} Hk={row.kv_heads} D={row.head_dim}: {us['ours']:.1f} us, dense {us['dense']:.1f} us, "
        f"ratio {ratio:.3f} (limit {LIMITS['seconds']}); cache {exact / record['dense_bytes']:.3f} of dense's bytes "
        f"(limit {LIMITS['bytes']})",
        flush=True,
    )
    device.release()
    return record


def run(out: Path | None, rounds: int = ROUNDS) -> Record:
    device = here()
    result = results.started(kind="decoding", device=device.describe(), rows=[])
    for row in rows(device.kind == "cuda"):
        result["rows"].append(measure(row, device, rounds))
        results.save(result, out)
    return result


def main() -> None:
    options = results.program("decoding", __doc__)
    options.add_argument("--rounds", type=int, default=ROUNDS, help="times of each; %(default)s by default")
    given = options.parse_args()
    run(given.out, given.rounds)


if __name__ == "__main__":
    main()
