"""Chunks of a stream on a GPU are the whole call, and rows that were read before go through torch's flash attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import dense_attention

from longnet import DilatedCache, stream_attention
from longnet.attention.streaming import rectangle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "LongNet": ((64, 256), (1, 4), {}),
    "window": ((), (), {"window": 70}),
    "stride": (None, 4, {"window": 50, "dilated_queries": False, "head_offsets": "grouped"}),
    "blocks": (None, 2, {"window": 50, "dilated_queries": False, "dilation_block": 16}),
    "grid": ((64, 256), (1, 4), {"segment_offset": 77}),
}


@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 48), (torch.float32, 32)])
def test_chunks_are_the_whole(
    name: str, dtype: torch.dtype, head_dim: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, rates, more = KINDS[name]
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return flash(*args)

    flash = rectangle._by_gpu_flash
    monkeypatch.setattr(rectangle, "_by_gpu_flash", counted)
    q, k, v = (torch.randn(2, heads, 400, head_dim, device="cuda", dtype=dtype) for heads in (4, 2, 2))
    cache = DilatedCache(
        lengths, rates, batch_size=2, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda", **more
    )
    parts = [
        stream_attention(*(x[:, :, start:stop] for x in (q, k, v)), cache, scale=scale)
        for start, stop in ((0, 130), (130, 133), (133, 320), (320, 400))
    ]
    given = {"segment_lengths": lengths, "dilation_rates": rates}
    kind = {key: one if isinstance(one, tuple) else (one,) for key, one in given.items()} | more
    want, _ = dense_attention(*(x.double().cpu() for x in (q, k, v)), **kind, is_causal=True, scale=scale)
    got = torch.cat(parts, 2).double().cpu()
    allowed = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert float((got - want).norm()) <= allowed * float(want.norm())
    # A window's rows are few for each query; they are not a rectangle.
    assert bool(calls) == (dtype != torch.float32 and name != "window")
