"""What ONNX gets in place of the operators: against the oracle, and in an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from oracle import dense_attention
from torch import nn

import longnet
from longnet.attention.backends.decomposition import decompose
from longnet.geometry import Pattern


@pytest.mark.parametrize(
    ("lengths", "rates", "offsets"),
    [
        ((8, 32), (1, 2), "interleaved"),
        ((7, 19), (2, 3), "interleaved"),
        ((64,), (4,), "blocked"),
        ((5,), (5,), "blocked"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_it_is_the_definition(lengths: Any, rates: Any, offsets: Any, causal: bool, padded: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 41, 6, dtype=torch.float64, generator=draw) for h in (4, 2, 2))
    mask = torch.zeros(2, 41, dtype=torch.bool)
    if padded:
        mask[0, :9] = mask[1, 17:30] = True
        v = v.masked_fill(mask[:, None, :, None], torch.nan)
    pattern = Pattern.parse(lengths, rates, offsets)
    out, lse = decompose(call(q, k, v, pattern, causal, 0.3, mask=mask if padded else None))
    clean = v.nan_to_num()
    expected, expected_lse = dense_attention(
        q, k, clean, lengths, rates, is_causal=causal, scale=0.3, key_padding_mask=mask, head_offsets=offsets
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


def test_it_adds_a_bias_by_distance() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 30, 6, dtype=torch.float64, generator=draw) for _ in range(3))
    bias = torch.randn(4, 2 * 32 - 1, dtype=torch.float64, generator=draw)
    distance = torch.arange(30) - torch.arange(30)[:, None]
    out, _ = decompose(call(q, k, v, Pattern.parse((8, 32), (1, 2)), True, 0.5, bias=bias))
    expected, _ = dense_attention(
        q, k, v, (8, 32), (1, 2), is_causal=True, scale=0.5, score_bias=bias[:, distance + 31]
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    """The operation as a module, which an exporter takes."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return longnet.dilated_attention(q, k, v, (8, 32), (1, 2), is_causal=True, backend=self.backend)


def exported(folder: Path, model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """What onnxruntime computes of the exported model."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"torch.onnx.export needs {name}, which is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["portable", "auto"])
def test_the_operation_in_onnx(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    given = exported(tmp_path, Attention(backend), *inputs)
    torch.testing.assert_close(given, Attention("portable")(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_in_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = longnet.LongNetConfig(
        vocab_size=40, dim=32, layers=2, heads=4, kv_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 2)
    )
    model, ids = longnet.LongNetLM(config).eval(), torch.randint(40, (2, 40))
    torch.testing.assert_close(exported(tmp_path, model, ids), model(ids).detach(), rtol=1e-4, atol=1e-4)
