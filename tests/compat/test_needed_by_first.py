"""Attention of which only the rows are wanted that the first token attends to: there as always, nothing elsewhere."""

from __future__ import annotations

import importlib.util

import interpreted
import pytest
import torch

from longnet.attention.functional import pattern_attention
from longnet.compat.attention import TORCHSCALE
from longnet.geometry import Pattern

BACKENDS = ["portable", "cpu_flash"]
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    BACKENDS.append("triton")
PATTERNS = {
    "nested": ((16, 32), (1, 2)),
    "apart": ((8, 20, 64), (1, 2, 4)),
    "uncovered": ((10, 40), (2, 4)),
    "shifted": ((9, 25, 200), (1, 2, 8)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")
def test_wanted_rows_are_as_always_and_the_others_nothing(name: str, backend: str) -> None:
    if backend == "triton":
        interpreted.hasten()
    pattern, length = Pattern.parse(*PATTERNS[name], "blocked"), 45
    read = torch.zeros(length, dtype=torch.bool)
    for branch in pattern.branches:
        read[: branch.segment_length : branch.dilation_rate] = True
    assert not read.all()
    dtype = torch.float32 if backend == "triton" else torch.float64
    generator = torch.Generator().manual_seed(0)
    q, k, v, towards = (torch.randn(2, 4, length, 16, generator=generator, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for some in (False, True):
        out, lse = pattern_attention(
            *inputs, pattern, return_lse=True, backend=backend, needed_by_first=some, definition=TORCHSCALE
        )
        grads = torch.autograd.grad(out, inputs, towards * (1.0 if some else read[:, None].to(dtype)))
        results.append((out[:, :, read], lse[:, :, read], *grads))
        if some:
            assert not out[:, :, ~read].any() and bool((lse[:, :, ~read] == torch.inf).all())
    allowed = 1e-5 if backend == "triton" else 1e-11
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=allowed, atol=allowed)


def test_it_takes_no_mask_and_nothing_causal() -> None:
    q, pattern = torch.zeros(1, 4, 20, 8), Pattern.parse((8, 20), (1, 2), "blocked")
    with pytest.raises(ValueError, match="needed_by_first"):
        pattern_attention(q, q, q, pattern, is_causal=True, needed_by_first=True, definition=TORCHSCALE)
    mask = torch.zeros(1, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match="needed_by_first"):
        pattern_attention(q, q, q, pattern, key_padding_mask=mask, needed_by_first=True, definition=TORCHSCALE)
    with pytest.raises(ValueError, match="LongNet's attention"):
        pattern_attention(q, q, q, pattern, needed_by_first=True)
