"""Quantised weights: which layers, how far off, saved and read back, and training that knows of it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from longnet import LongNetConfig, LongNetLM
from longnet.compress import SCHEMES, convert_qat, prepare_qat, prune_heads, quantization, quantize, quantized
from longnet.models.layer_types import LAYER_TYPES
from longnet.training import CheckpointError, load_model, save_model

pytest.importorskip("torchao")

# On a CPU without VNNI int8 products saturate: int8dyn is refused there.
HERE = tuple(scheme for scheme in SCHEMES if scheme != "int8dyn" or quantized.exact_int8_product())

# What torchao rounds a weight to: half a step of 127 to the largest of its row, or half a step of e4m3's three bits.
ROUNDING = {"int8wo": 0.5 / 127, "int8dyn": 0.5 / 127, "float8wo": 2.0**-4}


def make(**changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano", **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(length: int = 70) -> torch.Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", HERE)
def test_every_linear_layer_of_the_blocks_and_nothing_else(scheme: str) -> None:
    model = make(tie_embeddings=False)
    before = copy.deepcopy(model)
    assert quantization(model) is None
    quantize(model, scheme)
    assert quantization(model) == scheme
    for (name, module), old in zip(model.named_modules(), before.modules(), strict=True):
        if isinstance(module, nn.Linear) and name != "head":
            off = (module.weight.dequantize() - old.weight).abs()
            assert off.max() > 0 and (off <= ROUNDING[scheme] * old.weight.abs().amax(1, keepdim=True) * 1.001).all()
            assert torch.equal(module.bias, old.bias)
        elif hasattr(module, "weight"):
            assert type(module.weight) is nn.Parameter and torch.equal(module.weight, old.weight)
    expected, got = before(tokens()), model(tokens())
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("scheme", HERE)
@pytest.mark.parametrize("pruned", [False, True])
def test_saved_and_read_back_to_the_bit(scheme: str, pruned: bool, tmp_path: Path) -> None:
    model = make()
    if pruned:
        model = prune_heads(model, {0: [1], 1: [0, 3]})
    save_model(model, tmp_path / "whole")
    quantize(model, scheme)
    save_model(model, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert quantization(again) == scheme and torch.equal(again(tokens()), model(tokens()))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    stored = load_file(tmp_path / "small" / "model.safetensors")
    kind = torch.float8_e4m3fn if scheme == "float8wo" else torch.int8
    assert stored["blocks.0.attention.q_proj.weight.qdata"].dtype == kind


def test_the_head_when_asked(tmp_path: Path) -> None:
    model = make(tie_embeddings=False)
    quantize(model, "int8wo", head=True)
    assert type(model.head.weight).__name__ == "Int8Tensor"
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert type(again.head.weight).__name__ == "Int8Tensor" and torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("scheme", HERE)
def test_generates_and_streams(scheme: str) -> None:
    model = prune_heads(make(), {0: [2]})
    batch = tokens()
    with torch.inference_mode():
        exact = model(batch)
        quantize(model, scheme)
        whole, cache = model(batch), model.new_cache(2)
        parts = [model(batch[:, first:last], cache=cache) for first, last in ((0, 20), (20, 21), (21, 70))]
    streamed = torch.cat(parts, 1)
    # In a chunk an activation can round the other way, by the order of a sum: single logits differ then, the norm does not.
    assert (streamed - exact).norm() < 1.2 * (whole - exact).norm() < 0.12 * exact.norm()
    if scheme != "int8dyn":
        torch.testing.assert_close(streamed, whole, rtol=1e-2, atol=1e-4)
    assert model.generate(batch[:, :30], 4, temperature=0).shape == (2, 34)


def test_a_cpu_whose_int8_products_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(quantized, "exact_int8_product", lambda: False)
    with pytest.raises(ValueError, match="int8 matrix product of this CPU saturates"):
        quantize(model, "int8dyn")
    quantize(model, "int8wo")


def test_a_model_in_bfloat16_and_under_autocast() -> None:
    expected = make()(tokens())
    low = make().to(torch.bfloat16)
    quantize(low, "int8wo")
    assert low(tokens()).dtype == torch.bfloat16
    cast = make()
    quantize(cast, "int8wo")
    with torch.autocast("cpu", torch.bfloat16):
        assert (cast(tokens()).float() - expected).norm() < 0.1 * expected.norm()
    assert (low(tokens()).float() - expected).norm() < 0.1 * expected.norm()


def test_any_module_with_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    quantize(model, "int8wo")
    assert quantization(model) == "int8wo" and model(torch.randn(3, 8)).shape == (3, 4)


@pytest.mark.parametrize("scheme", HERE)
def test_training_rounds_as_the_quantised_model_will(scheme: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(3, 20, 32, requires_grad=True)
    plain = layer(x)
    prepare_qat(layer, scheme)
    rounded = layer(x)
    convert_qat(layer, scheme)
    assert quantization(layer) == scheme
    error = (rounded - plain).norm()
    assert error > 0 and (layer(x) - rounded).norm() < 1e-3 * error


@pytest.mark.parametrize("scheme", HERE)
def test_a_model_trained_for_its_rounding(scheme: str) -> None:
    model, batch = make(), tokens(65)
    before = model.loss(batch[:, :-1], batch[:, 1:]).item()
    prepare_qat(model, scheme)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(10):
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.loss(batch[:, :-1], batch[:, 1:]).item()
    convert_qat(model, scheme)
    after = model.loss(batch[:, :-1], batch[:, 1:]).item()
    assert trained < before - 0.3 and abs(after - trained) < 0.02


def test_what_is_refused_and_left_as_it_was() -> None:
    model = make()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for bad, kind, message in (
        (lambda: quantize(model, "int4"), ValueError, "scheme='int4' is unknown: expected one of"),
        (lambda: prepare_qat(model, "fp8"), ValueError, "scheme='fp8' is unknown"),
        (lambda: convert_qat(model, "int8wo"), ValueError, "expected prepare_qat first"),
        (lambda: quantize(model, "int8wo", head=True), ValueError, "no output head of its own"),
        (lambda: quantize(state, "int8wo"), TypeError, "model has type dict: expected an nn.Module"),
        (lambda: quantize(nn.ReLU(), "int8wo"), ValueError, "no nn.Linear layer to quantise"),
        (lambda: quantize(make().double(), "int8wo"), ValueError, "weight has dtype torch.float64: expected one of"),
    ):
        with pytest.raises(kind, match=message):
            bad()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    quantize(model, "int8wo")
    with pytest.raises(ValueError, match="q_proj is Int8Tensor already"):
        quantize(model, "float8wo")
    prepared = make()
    prepare_qat(prepared, "int8wo")
    with pytest.raises(ValueError, match="q_proj is FakeQuantizedLinear already"):
        quantize(prepared, "int8wo")


def test_a_file_that_is_quantised_otherwise(tmp_path: Path) -> None:
    model = make()
    quantize(model, "int8wo")
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    # Version 1 of the format has no digest that would see the change first.
    weights, about = load_file(file), {"format": "longnet-model-1"}
    save_file(weights, file, metadata={**about, "quantization": "int9wo"})
    with pytest.raises(ValueError, match="scheme='int9wo' is unknown"):
        load_model(tmp_path / "model")
    save_file(weights, file, metadata=about)
    with pytest.raises(CheckpointError, match=r"does not fit the model: it lacks .*weight"):
        load_model(tmp_path / "model")


def test_a_missing_torchao_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"needs torchao, which is not installed. In a checkout of longnet: pip install '.\[quant\]'",
    ):
        quantize(make(), "int8wo")


@pytest.mark.parametrize("layer_types", [*((one,) for one in LAYER_TYPES), LAYER_TYPES])
def test_layers_of_every_type(tmp_path: Path, layer_types: tuple[str, ...]) -> None:
    """Quantised, saved, read back, generating, and as another stack."""
    layers = {"layers": max(2, len(layer_types)), "sliding_window": 9, "stride": 2, "stride_block": 3, "kv_heads": 2}
    model = make(layer_types=layer_types, **layers)
    exact = model(tokens())
    quantize(model, "int8wo")
    rounded = model(tokens())
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and quantization(loaded) == "int8wo"
    assert torch.equal(loaded(tokens()), rounded)
    assert torch.equal(loaded.generate(tokens(9), 3, temperature=0), model.generate(tokens(9), 3, temperature=0))
    other = model.with_layer_types(("full_attention",))
    assert quantization(other) == "int8wo" and other(tokens()).isfinite().all()


def test_weights_of_another_stack_are_not_read_as_this_one(tmp_path: Path) -> None:
    save_model(make(layer_types=("sliding_attention",)), tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for changes in ({"layer_types": ["full_attention"] * 2}, {"layer_types": None}, {"sliding_window": 5}):
        file.write_text(json.dumps(values | changes))
        with pytest.raises(CheckpointError, match=f"does not fit .*{next(iter(changes))}="):
            load_model(tmp_path)
    plain = tmp_path / "plain"
    save_model(make(), plain)
    without = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(without | {"layer_types": ["full_attention"]}))
    with pytest.raises(CheckpointError, match="does not fit .*layer_types="):
        load_model(plain)
