"""The benchmark at small sizes: what it writes, and that a wrong result gets no number."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_tools import run

from benchmarks import checks, cli, peers, report, results, timing, verdicts
from benchmarks.cases import CPU_QUICK, Case, draw
from benchmarks.device import Cpu, no_peak_reason
from benchmarks.suites import speed
from benchmarks.timing import interleave, quartiles


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The JSON of a quick run of everything in one dtype, and what the run printed."""
    path = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    done = run("cpu", "--quick", "--dtype", "float32", "--out", path)
    assert done.exit_code == 0, done.stderr
    return path, done.stdout


@pytest.fixture
def result(quick: tuple[Path, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(quick[0].read_text())
    return copy.deepcopy(loaded)


def test_a_run_writes_every_repetition_and_what_it_depends_on(quick, result):
    assert set(result["versions"]) == {"python", "torch", "longnet"}
    assert set(result["commit"]) == {"sha", "dirty", "sources"}
    assert result["device"]["threads"] == torch.get_num_threads()
    assert result["limits"]["speed"] == {"forward": 1.15, "forward_backward": 1.25}
    assert [record["pass"] for record in result["speed"]] == ["forward", "forward_backward"]
    for record in result["speed"]:
        assert {name: len(seconds) for name, seconds in record["judged"].items()} == {"same_flop": 3, "ours": 3}
        assert set(record["beside"]) == {"same_flop", "ours_tokens_first", "dense"}
    assert len(result["import"]["longnet_seconds"]) == 1
    assert set(result["growth"][0]["seconds"]) == {"256", "512"}
    if no_peak_reason() is None:
        assert [one["pass"] for one in result["memory"]] == ["forward", "forward_backward"]
        # The result is part of the peak: out, and after a backward pass three gradients too.
        for one, least in zip(result["memory"], (1, 4), strict=True):
            assert one["live_peak_bytes"] >= least * one["output_bytes"]
    every = result["checks"] + result["speed"][0]["checks"] + result["growth"][0]["checks"]
    assert all(0 <= check["error"] <= check["allowed"] for check in every)
    assert quick[0].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_are_printed_from_the_json(quick, result):
    path, printed = quick
    shown = run("show", path)
    assert shown.exit_code == 0
    assert printed.startswith(shown.stdout)
    text = run("show", path, "--markdown").stdout
    for table in report.tables(result):
        assert f"**{table.title}**" in text
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert f"| {' | '.join(row)} |" in text
    assert text.rstrip() == report.markdown(result)


def test_without_a_command_everything_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "cpu", lambda options: calls.append(options.section) or 0)
    assert run().exit_code == 0
    assert calls == [None]


def test_show_refuses_what_is_no_result(tmp_path):
    (tmp_path / "other.json").write_text('{"schema": 0}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("other.json", "broken.json", "missing.json"):
        done = run("show", tmp_path / name)
        assert done.exit_code == 2
        assert name in done.stderr


def fails(tmp_path: Path, what: str) -> None:
    """A quick run ends with code 1, names the check, and prints and writes nothing else."""
    path = tmp_path / "result.json"
    done = run("cpu", "--quick", "--section", "speed", "--dtype", "float32", "--out", path)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert what in done.stderr
    assert "no number is given" in done.stderr
    assert not path.exists()


def test_a_result_takes_no_pipes_place(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "target.json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        results.save({"a": 1}, pipe)
        assert json.loads(os.read(reader, 100)) == {"a": 1} and pipe.is_fifo()
    finally:
        os.close(reader)
    results.save({"a": 1}, link)
    assert link.is_symlink() and json.loads((tmp_path / "target.json").read_text()) == {"a": 1}


def test_a_result_unlike_the_oracle_gets_no_number(monkeypatch, tmp_path):
    right = checks.oracle().dense_attention

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*arguments, **options)
        return out * 1.001, lse

    monkeypatch.setattr(checks.oracle(), "dense_attention", wrong)
    fails(tmp_path, "oracle, N=600 float64, cpu_flash: out")


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change what is timed, not what is compared with the oracle."""
    right = checks.attend_dilated

    def attend_dilated(case: Case, backend: str = "auto") -> checks.Attend:
        attend = right(case, backend)
        return lambda query, key, value: change(attend(query, key, value), query)

    monkeypatch.setattr(timing, "attend_dilated", attend_dilated)


def test_wrong_rows_at_the_timed_size_get_no_number(monkeypatch, tmp_path):
    def change(out: Tensor, query: Tensor) -> Tensor:
        # The last eighth of the rows, by one per cent.
        weight = torch.ones(out.shape[:-1])
        weight[:, -1, -out.shape[2] // 8 :] = 0.99
        return out * weight.unsqueeze(-1)

    corrupt(monkeypatch, change)
    fails(tmp_path, "256 rows, N=256 float32: out")


def test_wrong_gradients_at_the_timed_size_get_no_number(monkeypatch, tmp_path):
    corrupt(monkeypatch, lambda out, query: out + 0.01 * (query - query.detach()))
    fails(tmp_path, "N=256 float32: grad_query")


def test_nan_is_no_pass():
    with pytest.raises(checks.CheckFailed, match="relative error nan"):
        checks.Check("something", math.nan, 1.0).require()


def test_allowed_errors_of_half_precision_are_twice_torchs_own():
    tensors = draw(Case(256, "bfloat16", heads=2, head_dim=16))
    out, *gradients = checks.allowed_errors(tensors, is_causal=True)
    assert 1e-3 < out < 1e-2
    assert all(1e-3 < error < 2e-2 for error in gradients)


@pytest.mark.parametrize("case", speed.CELLS["cpu"], ids=str)
def test_the_same_flop_kernel_is_scaled_by_seven_quarters(case):
    assert (case.block, case.blocks) == (2048, case.length // 2048)
    assert case.flop_ratio == Fraction(7, 4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_flop_ratio_counts_pairs(is_causal):
    """By counting, for a length that leaves incomplete segments and blocks."""
    case = Case(100, "float32", heads=3, segment_lengths=(16, 48), dilation_rates=(1, 3), is_causal=is_causal)
    count = checks.oracle().multiplicity(case.segment_lengths, case.dilation_rates, 3, 100, is_causal, "interleaved")
    block = torch.ones(16, 16).tril().sum() if is_causal else torch.ones(16, 16).sum()
    assert case.flop_ratio == Fraction(int(count.sum()), int(3 * 6 * block))


def test_repetitions_are_interleaved_after_one_warm_up_each():
    calls: list[str] = []
    seconds = interleave(Cpu(), {name: lambda name=name: calls.append(name) for name in "ab"}, 3, 3, 0.0)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_quartiles_enclose_the_median():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.skipif(no_peak_reason() is not None, reason="needs Linux's /proc/self/clear_refs")
def test_the_peak_is_seen_after_it_was_freed():
    size, device = 64 << 20, Cpu()
    # What earlier tests freed and malloc kept would be used again without being seen.
    device.release()
    device.reset_peak()
    before = device.allocated()
    torch.ones(size // 4, dtype=torch.float32)
    # The kernel counts resident pages per processor and adds them up now and then.
    assert 0.99 * size < device.peak() - before < 1.5 * size


def test_drawn_tensors_are_random_and_the_same_every_time():
    case = replace(CPU_QUICK, dtype="bfloat16")
    first, second = draw(case), draw(case)
    for one, other in zip(first.all, second.all, strict=True):
        assert one.shape == case.shape
        assert torch.equal(one, other)
        assert 0.9 < one.float().std() < 1.1
    assert not torch.equal(first.query, first.key)
    assert all(one.stride()[1:3] == (16, 64) for one in first.tokens_first().all)


def test_missed_limits_are_said(result):
    result["judged"] = True
    for name, seconds in {"same_flop": 0.1, "ours": 0.1 * 1.75 * 1.2}.items():
        for record in result["speed"]:
            record["judged"][name] = [seconds] * 3
    said = {one.what: str(one) for one in verdicts.verdicts(result)}
    assert said["time over the same-FLOP kernel, N=256 float32 forward"] == "missed"
    assert said["time over the same-FLOP kernel, N=256 float32 fwd+bwd"] == "reached"
    lines = "\n".join(verdicts.summary(result))
    assert "Missed: time over the same-FLOP kernel, N=256 float32 forward: 1.2, limit 1.15." in lines
    table = next(table for table in report.tables(result) if table.title == "Speed")
    assert [row[table.columns.index("verdict")] for row in table.rows] == ["missed", "reached"]


def test_what_cannot_be_measured_is_refused():
    assert run("cpu", "--quick", "--length", 8).exit_code == 2
    assert run("cpu", "--section", "nothing").exit_code == 2


@pytest.fixture
def torchscale(tmp_path: Path) -> Iterator[Path]:
    """A folder that looks like a checkout of torchscale; what a test imports from it is forgotten afterwards."""
    package = tmp_path / "checkout" / "torchscale" / "component"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    yield package.parents[1]
    for name in [name for name in sys.modules if name.split(".")[0] == "torchscale"]:
        del sys.modules[name]


def test_a_peer_that_cannot_be_imported_says_why(torchscale):
    assert "no checkout given" in str(peers.load_torchscale(None, CPU_QUICK).why_not)
    assert "has no torchscale/component" in str(peers.load_torchscale(torchscale, CPU_QUICK).why_not)
    (torchscale / "torchscale" / "component" / "dilated_attention.py").write_text("import a_package_nobody_has\n")
    peer = peers.load_torchscale(torchscale, CPU_QUICK)
    assert peer.why_not == "its import needs the package a_package_nobody_has, which is not installed"
    assert str(torchscale) not in sys.path


STAND_IN = """
import torch
from . import multihead_attention

class DilatedAttention(torch.nn.Module):
    def __init__(self, args, embed_dim, num_heads, self_attention):
        super().__init__()
        self.heads, self.args = num_heads, args

    def forward(self, query, key, value, is_causal):
        rows = (x.unflatten(-1, (self.heads, -1)) for x in (query, key, value))
        out, lse = multihead_attention.flash_attn_func(*rows, is_causal=is_causal)
        return out.flatten(2), None
"""


def test_a_peer_is_checked_before_it_is_timed(torchscale):
    """A stand-in of plain attention in torchscale's shape: right for one branch over everything, wrong for a mixture."""
    component = torchscale / "torchscale" / "component"
    (component / "multihead_attention.py").write_text("flash_attn_func = None\n")
    (component / "dilated_attention.py").write_text(STAND_IN)
    plain = Case(64, "float32", heads=2, head_dim=8, segment_lengths=(64,), dilation_rates=(1,))
    peer = peers.load_torchscale(torchscale, plain)
    assert peer.why_not is None
    assert max(peer.errors.values()) < 1e-5
    assert peer.make is not None
    (out,) = peer.make(plain, draw(plain).rows()).passes["forward"]()
    assert out.shape == (1, 64, 16)
    wrong = peers.load_torchscale(torchscale, CPU_QUICK)
    assert wrong.make is None
    assert "its out is off by" in str(wrong.why_not)
