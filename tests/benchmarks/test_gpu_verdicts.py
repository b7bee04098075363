"""What a GPU result says: limits, the share of pairs that is visited, parts of a run as one."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_tools import run

from benchmarks import cases, checks, harness, report, verdicts, visited
from longnet.geometry import Pattern
from longnet.geometry.nests import Nest, make_nests


@pytest.fixture
def result(quick_gpu_run: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(quick_gpu_run)


def judged(result: dict[str, Any], length: int, head_dim: int, is_causal: bool, which: str, **seconds: float) -> Any:
    """A speed record of the full benchmark with these times, and its verdicts."""
    record = copy.deepcopy(result["speed"][2 if which == "forward" else 3])
    record["case"] |= {"length": length, "head_dim": head_dim, "is_causal": is_causal}
    record["reference"] = "dense" if length == 8192 else "same_flop"
    record["ratio"] = 1.0 if length == 8192 else 1.9375
    record["judged"] = {record["reference"]: [1.0] * 3, "ours": [seconds["ours"]] * 3}
    record["beside"] = {"ours": [seconds["ours"]] * 3, "torchscale": [seconds["torchscale"]] * 3}
    result |= {"judged": True, "limits": json.loads(json.dumps(harness.limits("cuda")))}
    return verdicts.speed(result, record), verdicts.torchscale(result, record)


@pytest.mark.parametrize(
    ("length", "head_dim", "which", "tax", "least"),
    [
        (131072, 64, "forward", 1.00, 5.5),
        (1048576, 64, "forward", 1.00, 5.5),
        (1048576, 128, "forward", 1.05, 7.0),
        (32768, 128, "forward", 1.10, 6.0),
        (32768, 64, "forward_backward", None, None),
        (131072, 64, "forward_backward", 1.05, 3.8),
        (131072, 128, "forward_backward", 1.05, 4.5),
    ],
)
def test_limits_are_the_tables(result, length, head_dim, which, tax, least):
    times = {"ours": 1.9375 * 1.02, "torchscale": 1.9375 * 1.02 * 5}
    mine, theirs = judged(result, length, head_dim, True, which, **times)
    if tax is None:
        assert mine is theirs is None
        return
    assert (mine.limit, theirs.limit) == (tax, least)
    assert mine.value == pytest.approx(1.02)
    assert mine.reached == (tax > 1.02)
    assert theirs.value == pytest.approx(5.0)
    assert theirs.reached == (least < 5)
    # Both are judged without a causal mask too, but for torchscale.
    mine, theirs = judged(result, length, head_dim, False, which, **times)
    assert mine.limit == tax
    assert theirs is None


def test_short_sequences_are_compared_with_dense_attention(result):
    mine, theirs = judged(result, 8192, 64, True, "forward_backward", ours=0.9, torchscale=9.0)
    assert mine.what.startswith("time over dense attention")
    assert (mine.value, mine.limit, mine.reached) == (0.9, 1.0, True)
    assert theirs is None
    assert judged(result, 8192, 64, True, "forward", ours=0.9, torchscale=9.0) == (None, None)


def test_missed_limits_are_said(result):
    result["judged"] = True
    result["memory"][0]["peak_bytes"] = 3 * 2**30
    result["growth"][0]["seconds"] = {"512": [1.0], "1024": [2.2]}
    result["gigapath"][0]["beside"] = {"ours": [1.0], "torchscale": [2.0]}
    lines = list(report.summary(result))
    assert lines[0].endswith("limits reached.")
    text = "\n".join(lines)
    assert "Missed: GiB beyond q, k, v, N=512 H=4 D=64 causal forward: 3, limit 2.2." in text
    assert "Missed: growth of the time per token, forward: 0.1, limit 0.05." in text
    assert "Missed: torchscale's time over ours, N=301 H=4 D=48 not causal forward: 2, limit at least 3." in text


def distinct(nests: tuple[Nest, ...], head_offsets: str, heads: int, length: int, is_causal: bool) -> int:
    """Pairs that any branch of a nest has, once a nest, by counting."""
    total = 0
    for nest in nests:
        count = checks.oracle().multiplicity(
            nest.segment_lengths, nest.dilation_rates, heads, length, is_causal, head_offsets
        )
        total += int((count > 0).sum())
    return total


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("length", [64, 77, 130])
@pytest.mark.parametrize(
    ("segments", "rates"),
    [((8, 16, 32), (1, 2, 4)), ((8, 24, 48), (1, 1, 2)), ((16, 24), (2, 3)), ((8, 32, 32), (1, 2, 4)), ((16,), (4,))],
)
def test_visited_pairs_by_counting(segments, rates, length, head_offsets, is_causal):
    pattern = Pattern.parse(segments, rates, head_offsets)
    for least_rows in (1, 4):
        nests = make_nests(pattern, 5, 16, least_rows)
        arguments = (nests, head_offsets, 5, length, is_causal)
        assert visited.visited_pairs(*arguments) == distinct(*arguments)


def test_the_papers_series_visits_a_part_of_its_pairs():
    case = replace(cases.GPU, is_causal=False)
    # Of every branch after the first half the keys lie outside the finer segment.
    share = Fraction(1) + Fraction(1, 2) * (Fraction(1, 2) + Fraction(1, 4) + Fraction(1, 8) + Fraction(1, 16))
    assert visited.visited_share(case) == pytest.approx(float(share / Fraction(31, 16)))
    assert len(visited.kernel_nests(case)) == 1


def parts(tmp_path: Path, result: dict[str, Any]) -> tuple[Path, Path]:
    """The result as two files: speed and ceilings in one, everything else in the other."""
    empty = {section: [] for section in ("speed", "memory", "gigapath", "growth", "curves", "longest", "stream")}
    first = result | empty | {"speed": result["speed"]}
    second = result | {"speed": [], "ceilings": None, "date": "another day"}
    paths = tmp_path / "first.json", tmp_path / "second.json"
    for path, one in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(one))
    return paths


def test_parts_of_a_run_merge_to_the_whole(tmp_path, result):
    out = tmp_path / "merged.json"
    done = run("merge", *parts(tmp_path, result), "--out", out)
    assert done.exit_code == 0, done.stderr
    merged = json.loads(out.read_text())
    assert merged.pop("dates") == [result["date"], "another day"]
    assert merged == result
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["commit", "device", "versions", "limits"])
def test_parts_of_different_runs_do_not_merge(tmp_path, result, key):
    first, second = parts(tmp_path, result)
    other = json.loads(second.read_text())
    other[key] = {"something": "else"} | ({"kind": "cuda"} if key == "device" else {})
    second.write_text(json.dumps(other))
    done = run("merge", first, second, "--out", tmp_path / "merged.json")
    assert done.exit_code == 2
    assert f"differ in {key}" in done.stderr
    assert not (tmp_path / "merged.json").exists()


def test_no_cell_is_merged_twice(tmp_path, result):
    first, _ = parts(tmp_path, result)
    again = tmp_path / "again.json"
    again.write_text(first.read_text())
    done = run("merge", first, again, "--out", tmp_path / "merged.json")
    assert done.exit_code == 2
    assert "both hold the cell" in done.stderr
