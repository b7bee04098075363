"""The comparison of patterns: each layer computes what its table of pairs says, and a run is whole at toy size."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning import __main__ as program
from benchmarks.learning import data, probes, report
from benchmarks.learning.__main__ import main
from benchmarks.learning.attention import Sinks, attend
from benchmarks.learning.model import Model, Shape
from benchmarks.learning.patterns import ARMS, DENSE, LOCAL, Band, Layer, cost, growing, half_dense, strided
from benchmarks.learning.train import formation_step

LENGTH, HEADS = 64, 4
LAYERS = {
    "window": Layer((Band(8),)),
    "strided": Layer((Band(8), Band(None, 0, 4))),
    "strided once": Layer((Band(8), Band(None, 8, 2))),
    "blocks": Layer((Band(8), Band(None, 0, 2, 4))),
    "growing": Layer((Band(8), Band(16, 8, 2), Band(32, 16, 4))),
    "half the heads": half_dense(2, 4),
    "published": Layer(branches=((8, 1), (16, 2), (32, 4))),
    "shifted": Layer(branches=((8, 1), (32, 4)), shift=5),
    "dilated whole": Layer(branches=((None, 2),)),
    "window and published": Layer((Band(8),), ((16, 1), (32, 2))),
}


def multiplicity(layer, heads, length):
    """How often each query reads each key, (H, N, N)."""
    times = torch.zeros(heads, length, length, dtype=torch.float64)
    query = torch.arange(length)[:, None]
    for head in range(heads):
        for band in layer.bands:
            key = torch.from_numpy(band.positions(head, length))
            distance = query - key
            read = (distance >= band.near) & (distance >= 0) & (distance < (length if band.far is None else band.far))
            times[head][:, key] += read.double()
        if (pattern := layer.pattern(length)) is None:
            continue
        for branch in pattern.branches:
            local = torch.arange(length) + layer.shift
            segment, inside = local // branch.segment_length, local % branch.segment_length
            selected = inside % branch.dilation_rate == head % branch.dilation_rate
            both = selected[:, None] & selected & (segment[:, None] == segment) & (query >= torch.arange(length))
            times[head] += both.double()
    return times


def dense(times, query, key, value):
    """Attention by a table of how often each key is read; rows without a key are 0."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = times * (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_reads_what_its_table_says(name):
    layer = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, HEADS, LENGTH, 16, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    times = multiplicity(layer, HEADS, LENGTH)
    got, want = attend(layer, *inputs), dense(times, *inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert want.abs().amax() > 0.1
    for one, other in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_pairs_are_counted_as_the_table_has_them(name):
    assert LAYERS[name].pairs(HEADS, LENGTH) == multiplicity(LAYERS[name], HEADS, LENGTH).sum()


def test_costs_that_are_known():
    assert cost((DENSE, DENSE), 8, 512) == 1.0
    assert cost((LOCAL,), 8, 8192) == pytest.approx((512 * 8192 - 512 * 511 / 2) / (8192 * 8193 / 2))
    assert cost((LOCAL, strided(2)), 8, 8192) == pytest.approx(0.37, abs=0.005)
    assert cost((growing(),), 8, 32768) < 0.13


def test_sinks_are_read_by_every_query():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, 128, 16, generator=generator) for _ in range(3))
    sinks = Sinks(*torch.randn(2, HEADS, 3, 16, generator=generator))
    got = attend(LAYERS["window"], query, key, value, sinks=sinks)
    times = torch.cat((torch.ones(HEADS, 128, 3), multiplicity(LAYERS["window"], HEADS, 128).float()), -1)
    want = dense(times, query, torch.cat((sinks.key[None], key), 2), torch.cat((sinks.value[None], value), 2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_every_pattern_is_a_stack_of_eight_layers(arm):
    layers = ARMS[arm](8)
    assert len(layers) == 8 and 0 < cost(layers, 8, 8192) <= 1.2


def test_a_model_can_be_made_to_read_otherwise():
    """What is trained as one stack and goes on as another computes the other one from then on."""
    torch.manual_seed(0)
    shape = Shape(layers=2, dim=32, heads=4, context=64, shift_keys=True)
    tokens = torch.randint(256, (1, 64))
    dense, windows = (DENSE, DENSE), (Layer((Band(4),)), Layer((Band(4), Band(None, 0, 4))))
    model = Model(shape)
    found = []
    for layers in (dense, windows, dense):
        model.read_as(layers, torch.device("cpu"))
        found.append(model(tokens))
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])
    assert [(block.shift_keys, block.rotates) for block in model.blocks] == [(True, True)] * 2
    model.read_as(windows, torch.device("cpu"))
    assert [block.shift_keys for block in model.blocks] == [False, True]


def test_repetitions_and_their_distance():
    window = np.frombuffer(b"0123456789abcdef, and again: 0123456789abcdeX", dtype=np.uint8)
    distance = probes.repeat_distance(window)
    assert set(np.unique(distance)) == {0, 29}
    assert distance[len(window) - 2] == 0  # X is no repetition of f
    assert (distance == 29).sum() == len("0123456789abcde") - probes.GRAM


def test_a_copy_is_cheap_for_who_looks_back():
    """A model that knows the passage before: bits by a rule, not learned."""
    text = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, 4096).astype(np.uint8)

    def bits(windows):
        back = np.zeros(windows[:, 1:].shape)
        back[:, 300:] = 8.0 * (windows[:, 301:] != windows[:, 1:-300])
        back[:, :300] = 8.0
        return back

    found = probes.copied(bits, text, 1024, (300, 500), 4, 0)
    assert found["300"] == 0.0 and found["500"] > 7.5


def test_near_copies_of_training_text_are_not_held_out(tmp_path):
    generator = np.random.Generator(np.random.Philox(key=1))
    for number in range(64):
        lines = [f"line {generator.integers(1 << 40)} of {number}" for _ in range(40)]
        (tmp_path / f"{number}.txt").write_text("\n".join(lines))
        if number < 40:
            (tmp_path / f"{number}-vendored.txt").write_text("\n".join([*lines, "and one more"]))
    text = data.read_text([tmp_path])
    assert text.facts["near_copies_left_out"] > 0 and text.facts["held_out_files"] > 0
    held = {line for line in text.held_out.tobytes().split(b"line ") if b" of " in line}
    assert not held & set(text.train.tobytes().split(b"line "))


def test_the_step_at_which_far_text_is_found():
    checks = [
        {"step": step, "near_repeats": near, "far_repeats": far}
        for step, near, far in ((1, 3.0, 3.2), (2, 1.0, 2.8), (3, 0.4, 0.6), (4, 0.2, 0.3))
    ]
    assert formation_step(checks) == 3 and formation_step(checks[:2]) is None


@pytest.fixture
def source(tmp_path):
    """A folder of text."""
    generator = np.random.Generator(np.random.Philox(key=2))
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number}.py").write_text(
            "\n".join(f"value_{generator.integers(999)} = {number}" for _ in range(60))
        )
    return folder


@pytest.fixture
def smaller(monkeypatch):
    """Than the toy size of the command: half a minute a run is too long here."""
    shape = replace(program.SMALL.shape, layers=2, context=512)
    monkeypatch.setattr(program, "SMALL", replace(program.SMALL, shape=shape))


@pytest.mark.usefixtures("smaller")
def test_a_run_goes_on_with_what_is_missing(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [
        "--small",
        "--data",
        str(source),
        "--out",
        str(out),
        "--arms",
        "window,dense then window+stride 4 middle quarter,longnet",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks.learning", *arguments])

    main()
    said = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        *("dense_then_window_stride_4_middle_quarter-0.json", "longnet-0.json", "window-0.json"),
    ]
    record = json.loads((out / "dense_then_window_stride_4_middle_quarter-0.json").read_text())
    assert 0 < record["bits"] < 9 and record["cost"] < 1.5 and len(record["by_window"]) == 2
    assert "step 2 of 2" in said
    (out / "window-0.json").unlink()
    main()
    said = capsys.readouterr().out
    assert "window, seed 0" in said and "stride" not in said and "longnet," not in said

    groups = report.load(out)
    table = report.comparison(groups, "window")
    assert {row[0] for row in table.rows} == {"window", "dense then window+stride 4 middle quarter", "longnet"}
    assert all("+-" in row[3] for row in table.rows if row[0] != "window")
    # Two steps say nothing of speed.
    assert record["tokens_a_second"] is None and {row[-2] for row in table.rows} == {"-"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures(groups, tmp_path / "pictures"))


@pytest.mark.usefixtures("smaller")
def test_a_list_is_shared_out_and_compiled_before_it_is_run(source, tmp_path, monkeypatch, capsys):
    runs, out = tmp_path / "runs.txt", tmp_path / "out"
    runs.write_text(
        '# two seeds\n--arms "window" --seeds 0,1\n\n--arms window --sinks 2 --label sinks\n--arms window\n'
        '--arms "dense then window+stride 4 middle quarter"\n'
    )
    whole = ["benchmarks.learning", "--small", "--data", str(source), "--out", str(out), "--list", str(runs)]
    names = ["window-0", "window-1", "window-sinks-0", "dense_then_window_stride_4_middle_quarter-0"]

    monkeypatch.setattr(sys, "argv", [*whole, "--compile-only"])
    main()
    assert capsys.readouterr().out.splitlines() == [f"{name}: compiled" for name in names]
    assert not out.exists()

    monkeypatch.setattr(sys, "argv", [*whole, "--part", "1/3"])
    main()
    assert [path.stem for path in out.iterdir()] == ["window-1"]
    record = json.loads((out / "window-1.json").read_text())
    assert record["settings"]["shape"]["sinks"] == 0 and record["seed"] == 1

    runs.write_text("--arms window\n--arms window --sinks 2\n")
    with pytest.raises(SystemExit):
        main()
    assert "several runs have the names ['window-0']" in capsys.readouterr().err
    runs.write_text("--arms window --minutes 3\n")
    with pytest.raises(SystemExit):
        main()
    assert "a line of --list: error: unrecognized arguments: --minutes 3" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*whole, "--part", "3/3"])
    with pytest.raises(SystemExit):
        main()
    assert "expected I/M" in capsys.readouterr().err


def test_layers_that_read_beyond_a_window_reach_far() -> None:
    for name, arm in ARMS.items():
        for layer in arm(8):
            assert layer.reaches_far == (layer != LOCAL), name


@pytest.mark.parametrize(("folder", "runs"), [("context-8192", "runs"), ("context-32768", "runs-32768")])
def test_the_list_of_the_evidence_is_that_of_its_results(folder, runs):
    root = Path(__file__).parents[2] / "benchmarks"
    out = root / "results" / "learning" / folder
    command, lines = program._parsers()
    options = command.parse_args(["--out", str(out), "--list", str(root / "learning" / f"{runs}.txt")])
    listed = program._planned(options, lines)
    assert all(program._is_made(one, out / f"{one.name}.json", command) for one in listed)
    assert sorted(one.name for one in listed) == sorted(path.stem for path in out.glob("*.json"))


@pytest.mark.parametrize("kind", ["other settings", "damaged"])
def test_a_file_that_holds_something_else_is_no_result(kind, source, tmp_path, monkeypatch, capsys):
    arguments = ["benchmarks.learning", "--small", "--data", str(source), "--out", str(tmp_path), "--arms", "window"]
    path = tmp_path / "window-0.json"
    made = {"arm": "window", "seed": 0, "settings": asdict(replace(program.SMALL, steps=7))}
    path.write_text(json.dumps(made)[: None if kind == "other settings" else 40])
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert str(path) in said and ("steps=7" in said if kind == "other settings" else "damaged" in said)
    if kind == "damaged":
        with pytest.raises(ValueError, match=r"window-0.json is damaged"):
            report.load(tmp_path)


def test_what_is_done_to_far_layers_is_done_to_those_in_the_middle_of_dense_ones():
    shape = Shape(layers=8, dim=32, heads=2, context=32, shift_keys=True, far_positions=False)
    model = Model(shape)
    model.read_as(ARMS["dense with middle keys shifted"](8), torch.device("cpu"))
    assert [block.shift_keys for block in model.blocks] == [False] * 3 + [True] * 2 + [False] * 3
    assert [block.rotates for block in model.blocks] == [True] * 3 + [False] * 2 + [True] * 3
    model.read_as(ARMS["window+dense 1/4"](8), torch.device("cpu"))
    assert [block.rotates for block in model.blocks] == [True, True, True, False] * 2
