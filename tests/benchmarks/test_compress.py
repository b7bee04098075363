"""The benchmark of pruned and quantised models, on a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import compress, report
from benchmarks.checks import CheckFailed
from longnet import LongNetConfig
from longnet.compress.quantized import exact_int8_product
from longnet.training import TrainSettings, train

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    (folder / "text.txt").write_text("".join(f"{n} squared is {n * n}\n" for n in range(600)))
    settings = TrainSettings(
        out=str(folder / "run"), model=LongNetConfig.preset("nano"), data=str(folder / "text.txt"), context=32, batch=4,
        steps=20, lr=3e-3, warmup=2, eval_every=0, save_every=0, device="cpu",
    )  # fmt: skip
    train(settings)
    return folder / "run"


def test_every_variant_is_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compress.json"
    compress.run(run, out, data=None, steps=2, held_out=256, decoded=2)
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    found = {record["name"]: record for record in result["variants"]}
    assert all(f"| {name} |" in printed for name in found)
    assert (
        len(found) == (9 if exact_int8_product() else 8)
        and result["same_data"]
        and {"torchao", "torch"} <= set(result["versions"])
    )
    dense = found["as trained"]
    for record in found.values():
        assert record["scored_bytes"] == 256 and 0 < record["bits_per_byte"] < 10
        assert median(record["forward_seconds"]) > 0 < median(record["decode_seconds"])
    assert found["int8 weights"]["file_bytes"] < 0.6 * dense["file_bytes"]
    assert found["25% of heads pruned"]["memory_bytes"] < dense["memory_bytes"]
    assert found["30% of weights pruned"]["zeros"] > dense["zeros"]
    # The model itself was not touched by what was made of it.
    assert abs(found["int8 weights"]["bits_per_byte"] - dense["bits_per_byte"]) < 0.1


def test_the_page_shows_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "compress-cpu-2026-11-25.json").read_text())
    assert not result["commit"]["dirty"]
    assert f"\n{report.tables(result)[0].markdown()}\n" in (root / "docs" / "compress.md").read_text(encoding="utf-8")


def test_other_text_is_refused_unless_it_is_named(run: Path) -> None:
    text, own = run.parent / "text.txt", run / "data"
    content = text.read_text()
    text.write_text(content + "more\n" * 20)
    own.rename(run.parent / "data of the run")
    try:
        with pytest.raises(ValueError, match="is not what the run was trained on: expected --data"):
            compress.run(run, None, data=None, steps=1, held_out=64, decoded=1)
    finally:
        text.write_text(content)
        (run.parent / "data of the run").rename(own)


def test_a_model_that_reads_back_otherwise_is_not_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress.load_model(run)
    other = compress.load_model(run)
    with torch.no_grad():
        other.embedding.weight.add_(0.1)
    monkeypatch.setattr(compress, "load_model", lambda path: other)
    with pytest.raises(CheckFailed, match="the model that was read back gives other logits"):
        compress.saved_size(model, torch.zeros(1, 8, dtype=torch.int64))
