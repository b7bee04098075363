"""The benchmark of longnet.hf: it compares before it times, and times what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import hf
from benchmarks.checks import CheckFailed
from longnet import LongNetConfig, LongNetLM
from longnet.hf import LongNetForCausalLM

NANO = LongNetConfig.preset("nano")


def test_it_times_all_of_them_in_turn():
    measured = hf.measure(NANO, 40, torch.device("cpu"), rounds=2)
    assert {name: len(values) for name, values in measured["seconds"].items()} == dict.fromkeys(
        ("plain", "transformers", "plain again", "plain, own loss"), 2
    )
    assert max(measured["errors"].values()) < 1e-5


def test_it_refuses_to_time_what_is_not_the_same(monkeypatch):
    def other(model: LongNetLM) -> LongNetForCausalLM:
        made = LongNetForCausalLM.from_longnet(model)
        made.model.stack.embedding_scale = 1.0
        return made

    class Other:
        from_longnet = staticmethod(other)

    monkeypatch.setattr(hf, "LongNetForCausalLM", Other)
    with pytest.raises(CheckFailed, match="computes something else"):
        hf.measure(NANO, 40, torch.device("cpu"), rounds=2)


def test_the_result_says_what_it_depends_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hf, "sizes", lambda on_gpu: (NANO, 24))
    monkeypatch.setattr(hf.measure, "__defaults__", (2,))
    result = hf.run(tmp_path / "hf.json")
    assert (tmp_path / "hf.json").is_file() and {"commit", "versions", "device", "ratio", "limit", "errors"} <= set(
        result
    )
    assert "transformers" in result["versions"] and "limit 1.03" in capsys.readouterr().out
