"""The table of docs/backends.md: what is asked of the code is asked anew, what it says of results is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from oracle import dense_attention
from torch import Tensor

from longnet import dilated_attention
from longnet.attention.backends import BACKENDS

ROOT = Path(__file__).parents[2]
PATTERN = ((8, 16), (1, 2))
ON_CPU = [
    pytest.param(
        backend.name,
        marks=pytest.mark.skipif(
            backend.name == "triton" and (torch.cuda.is_available() or importlib.util.find_spec("triton") is None),
            reason="needs Triton's interpreter, which runs without a GPU",
        ),
    )
    for backend in BACKENDS
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the table is that of a machine with triton")
def test_the_page_shows_what_the_script_prints() -> None:
    spec = importlib.util.spec_from_file_location("backend_table", ROOT / "scripts" / "backend_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- backends -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown.splitlines() == script.table()


@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_and_a_differentiable_lse_and_the_same_bits_twice(backend: str) -> None:
    q, k, v = (draw(1, 2, 20, 8, seed=seed) for seed in range(3))
    padding = torch.zeros(1, 20, dtype=torch.bool)
    padding[0, [0, 5, 19]] = True
    upstream = draw(1, 2, 20, 8, seed=3).detach(), draw(1, 2, 20, seed=4).detach()

    def results() -> list[Tensor]:
        both = dilated_attention(
            q, k, v, *PATTERN, is_causal=True, key_padding_mask=padding, return_lse=True, backend=backend
        )
        seen = both[1].isfinite()
        both = both[0], both[1].masked_fill(~seen, 0.0)
        return [*both, *torch.autograd.grad(both, (q, k, v), upstream)]

    first, second = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*exact, *PATTERN, is_causal=True, key_padding_mask=padding)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    expected = [out, lse, *torch.autograd.grad((out, lse), exact, [x.double() for x in upstream])]
    for found, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu_flash", "portable"])
@pytest.mark.parametrize("dim", [1, 7, 300])
def test_any_head_dimension(backend: str, dim: int) -> None:
    q, k, v = (draw(1, 2, 20, dim, seed=seed).detach().double() for seed in range(3))
    out = dilated_attention(q, k, v, *PATTERN, is_causal=True, backend=backend)
    torch.testing.assert_close(out, dense_attention(q, k, v, *PATTERN, is_causal=True)[0], rtol=1e-10, atol=1e-12)
