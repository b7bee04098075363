"""LongNets of longnet.hf as ONNX graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from longnet_models import HEADS, first, make, tokens

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADS)
def test_a_model_and_its_padding_in_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, inputs = make(name), {"input_ids": tokens(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.int64)}
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    # The graph was made without padding and takes a mask.
    inputs["attention_mask"][0, :4] = 0
    real = inputs["attention_mask"] == 1
    given = torch.from_numpy(session.run(None, {key: x.numpy() for key, x in inputs.items()})[0])
    expected = first(model, **inputs)
    if given.ndim == 3:
        given, expected = given[real], expected[real]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
