"""The commands that read a run take a model that was pruned and quantised too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from longnet.compress import SCHEMES, prune_heads, quantize
from longnet.compress.quantized import exact_int8_product
from longnet.training import load_model, save_model

pytest.importorskip("torchao")


# On a CPU without VNNI int8 products saturate: int8dyn is refused there.
HERE = tuple(scheme for scheme in SCHEMES if scheme != "int8dyn" or exact_int8_product())


@pytest.mark.parametrize("scheme", [None, *HERE])
def test_generate_and_stream(
    scheme: str | None, finished_run: Path, tmp_path: Path, call: Callable[..., CompletedProcess[str]]
) -> None:
    model = prune_heads(load_model(finished_run), {0: [1]})
    if scheme is not None:
        quantize(model, scheme)
    save_model(model, tmp_path / "small")
    result = call(
        "generate", tmp_path / "small", "--prompt", "line 1", "--tokens", 5, "--temperature", 0, "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("line 1")
    text = tmp_path / "text.txt"
    text.write_text("line 7: the square of 7 is 49\n" * 40)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"stream-{dtype}"
        result = call("stream", tmp_path / "small", "--data", text, "--out", out, "--dtype", dtype, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        last = json.loads((out / "stream.jsonl").read_text().splitlines()[-1])
        assert last["position"] == len(text.read_bytes())
