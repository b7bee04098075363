"""The benchmark of the slide encoder, on sizes that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gigapath, report
from longnet.gigapath import SlideEncoder


def test_every_part_is_written_and_a_failure_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gigapath, "make", lambda device: SlideEncoder(32, 1, device=device).eval())
    out = tmp_path / "x.json"
    seen: list[Any] = []

    def fails() -> None:
        seen.append(json.loads(out.read_text()))
        raise RuntimeError("no memory")

    parts = {
        "first": lambda: gigapath.on_cpu("float32", 50),
        "bad": fails,
        "last": lambda: gigapath.on_cpu("bfloat16", 50),
    }
    result = gigapath.run(out, parts)
    assert set(seen[0]["parts"]) == {"first"}
    assert json.loads(out.read_text()) == result
    assert result["errors"] == {"bad": "RuntimeError: no memory"}
    assert set(result["parts"]) == {"first", "last"}
    assert result["parts"]["last"]["dtype"] == "bfloat16 autocast" and result["parts"]["last"]["tiles"] == 50
    assert result["commit"]["sources"] and result["versions"]["torch"]


def test_slides_lie_on_different_cells() -> None:
    x, coords = gigapath.slide(500, torch.device("cpu"))
    assert x.shape == (1, 500, 1536) and len(coords[0].unique(dim=0)) == 500
    assert coords.min() >= 0 and coords.max() < 256_000


def test_a_step_leaves_gradients_of_this_step_alone() -> None:
    model = SlideEncoder(32, 1, dropout=0.0, drop_path=0.0)
    x, coords = gigapath.slide(20, torch.device("cpu"))
    gigapath.step(model, x, coords)
    first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    gigapath.step(model, x, coords)
    assert first and all(torch.equal(one, p.grad) for one, p in zip(first, model.parameters(), strict=True))
    assert gigapath.forward(model.eval(), x, coords).shape == (1, 32)


def test_parts_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gigapath, "make", lambda device: SlideEncoder(32, 1, device=device).eval())
    monkeypatch.setattr(gigapath.on_cpu, "__defaults__", (50,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["gigapath", "--out", str(tmp_path / "x.json"), "--part"]
    monkeypatch.setattr("sys.argv", [*arguments, "cpu float32"])
    with pytest.raises(SystemExit) as stopped:
        gigapath.main()
    assert stopped.value.code == 0
    assert set(json.loads((tmp_path / "x.json").read_text())["parts"]) == {"cpu float32"}
    monkeypatch.setattr("sys.argv", [*arguments, "gpu"])
    with pytest.raises(SystemExit) as stopped:
        gigapath.main()
    assert stopped.value.code == 2
    assert "--part gpu: expected one of cpu float32, cpu bfloat16" in capsys.readouterr().err


def test_the_page_shows_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "gigapath-gpu-2026-11-26.json").read_text())
    assert not result["commit"]["dirty"] and not result["errors"]
    page = (root / "docs" / "gigapath.md").read_text(encoding="utf-8")
    assert f"\n{report.tables(result)[0].markdown()}\n" in page and result["commit"]["sha"][:7] in page
    assert all(
        part["reached"] == dict.fromkeys(gigapath.LIMITS, True) for part in result["parts"].values() if "ratios" in part
    )
    assert {part["judged"] for part in result["parts"].values() if "ratios" in part} == {"longnet compiled"}
