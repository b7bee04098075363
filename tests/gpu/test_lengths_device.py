"""On a GPU another length compiles nothing, and calls of many lengths in turn get their own results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longnet import dilated_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KINDS = {
    "nests": {"segment_lengths": (256, 512, 2048), "dilation_rates": (1, 2, 4)},
    "window": {"segment_lengths": (), "dilation_rates": (), "window": 100},
    "strided": {
        "segment_lengths": None, "dilation_rates": 4, "window": 100, "dilated_queries": False, "head_offsets": "grouped",
    },
}  # fmt: skip


def call(length: int, kind: str, backend: str, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """out and gradients, in float32."""
    torch.manual_seed(seed)
    q, k, v, grad = (torch.randn(2, 4, length, 64, device="cuda") for _ in range(4))
    inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*inputs, **KINDS[kind], is_causal=True, backend=backend)
    upstream = grad.to(torch.bfloat16).to(dtype)
    return [x.float() for x in (out, *torch.autograd.grad(out, inputs, upstream))]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("backend", ["triton", "triton:general"])
def test_another_length_compiles_nothing(kind, backend, tmp_path, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    found, counts = {}, []
    for number, length in enumerate((2304, 2300, 2047, 1025, 2304, 1111)):
        for again in range(2):
            results = call(length, kind, backend, torch.bfloat16, number)
            if again:
                assert all(torch.equal(a, b) for a, b in zip(results, found[number], strict=True))
            found[number] = results
        made = len(list(Path(tmp_path).rglob("*.cubin")))
        # Filled-up copies are the only kernel that the first length has no need of.
        counts.append(made)
        assert made <= counts[0] + 1
        for got, want in zip(results, call(length, kind, "portable", torch.float32, number), strict=True):
            assert (got - want).norm() < 2e-2 * want.norm()
