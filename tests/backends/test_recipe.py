"""CONTRIBUTING's recipe for a backend works."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from calls import call
from oracle import dense_attention

from longnet.attention.backends import Backend
from longnet.geometry import Pattern

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def backend() -> Backend:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    module = ModuleType("dense")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return Backend("recipe", module)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_definition(backend: Backend, is_causal: bool, padded: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, h, 29, 6, dtype=torch.float64, generator=draw).requires_grad_() for h in (4, 2, 2)]
    mask = torch.rand(2, 29, generator=draw) < 0.3 if padded else None
    given = call(*inputs, Pattern.parse((8, 20), (2, 3)), is_causal, 0.3, mask=mask)
    assert backend.kernels.unsupported_reason(given) is None
    found = backend.run(given)
    expected = dense_attention(
        *inputs, (8, 20), (2, 3), is_causal=is_causal, scale=0.3, key_padding_mask=mask, head_offsets="interleaved"
    )
    alive = expected[1] > -torch.inf
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grads = [torch.randn(x.shape, dtype=x.dtype, generator=draw) for x in expected]
    grads[1] = grads[1].masked_fill(~alive, 0.0)
    results = [
        torch.autograd.grad((x[0] * grads[0]).sum() + (x[1].masked_fill(~alive, 0.0) * grads[1]).sum(), inputs)
        for x in (found, expected)
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_bias_is_refused(backend: Backend) -> None:
    x = torch.randn(1, 2, 5, 4)
    given = call(x, x, x, Pattern.parse(4, 1), bias=torch.randn(2, 9))
    assert backend.kernels.unsupported_reason(given) == "it takes no relative bias"
