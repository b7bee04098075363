"""The GPU benchmark on this CPU: everything but the device itself."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_tools import CpuMachine, measure, run

from benchmarks import checks, cli, compiling, device, harness, report, results, terminal, timing
from benchmarks.cases import GPU, GPU_QUICK, Case, draw
from benchmarks.environment import child_environment
from benchmarks.run import Run
from benchmarks.suites import memory, speed
from longnet.geometry.nests import make_nests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def result(quick_gpu_run: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(quick_gpu_run)


def test_a_run_holds_every_section_and_every_repetition(result):
    assert [(one["case"]["length"], one["pass"], one["reference"]) for one in result["speed"]] == [
        (128, "forward", "dense"),
        (128, "forward_backward", "dense"),
        (512, "forward", "same_flop"),
        (512, "forward_backward", "same_flop"),
    ]
    for record in result["speed"]:
        assert {name: len(seconds) for name, seconds in record["judged"].items()} == {record["reference"]: 3, "ours": 3}
        assert {"out", "grad_query"} <= {check["what"].split(": ")[-1] for check in record["checks"]}
    assert result["speed"][2]["ratio"] == 1.5
    assert [one["peak_bytes"] for one in result["memory"]] == [2**30, 2**30]
    assert set(result["growth"][0]["seconds"]) == {"512", "1024"}
    assert set(result["curves"][0]["seconds"]) == {"longnet", "dense"}
    assert {len(result["ceilings"]["seconds"][name]) for name in ("matrix", "copy")} == {20}
    assert set(result["versions"]) == {"python", "torch", "longnet", "triton", "cuda", "cudnn"}
    assert all(0 <= check["error"] <= check["allowed"] for check in result["checks"])


def test_tables_and_summary_are_made_from_the_json(result):
    text = report.plain(result)
    for table in report.tables(result):
        assert table.title in text
        for row in table.rows:
            assert len(row) == len(table.columns)
    titles = [table.title.split(":")[0] for table in report.tables(result)]
    assert titles[1:] == [
        "Ceilings, measured in the same run",
        "Speed",
        "Memory",
        "GigaPath's shape",
        "Growth",
        "Longest sequence",
        "Streaming",
    ]
    assert "Sizes too small to judge" in text
    assert "torchscale not timed: no checkout given: --torchscale PATH." in text


def test_the_command_writes_after_every_step_and_prints(monkeypatch, tmp_path):
    path = tmp_path / "new" / "result.json"
    saved: list[set[str]] = []
    save = results.save

    def spy(result: dict[str, Any], where: Path) -> None:
        saved.append({section for section in harness.sections("cuda") if result[section]})
        save(result, where)

    monkeypatch.setattr(results, "save", spy)
    monkeypatch.setattr(harness, "compile_all", lambda run: None)
    monkeypatch.setattr(cli, "no_cuda_reason", lambda: None)
    monkeypatch.setattr(cli, "Cuda", CpuMachine)
    done = run("gpu", "--quick", "--section", "gigapath", "--section", "memory", "--out", path)
    assert done.exit_code == 0, done.stderr
    assert saved[0] == set()
    assert saved[-1] == {"memory", "gigapath"}
    assert "GigaPath's shape" in done.stdout
    assert f"Written: {path}" in done.stdout
    assert run("show", path).stdout == done.stdout.split("Written")[0]


def test_what_an_owner_of_another_card_sends(monkeypatch, tmp_path):
    """The command of docs/backends.md: card, versions, commit, and whether results agreed with the definition."""
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python -m benchmarks (gpu .*) mine\.json$", page, re.MULTILINE)
    monkeypatch.setattr(harness, "compile_all", lambda run: None)
    monkeypatch.setattr(cli, "no_cuda_reason", lambda: None)
    monkeypatch.setattr(cli, "Cuda", CpuMachine)
    path = tmp_path / "mine.json"
    done = run(*command.split(), path)
    assert done.exit_code == 0, done.stderr
    sent = json.loads(path.read_text())
    assert sent["device"]["capability"] == "0.0" and sent["commit"]["sources"] and sent["versions"]["torch"]
    whats = {check["what"].split(": ")[0] for check in sent["checks"]}
    assert {"oracle, N=600 bfloat16", "oracle, N=600 float32"} <= whats
    # Five cases, four results each, of the definition's backend and of the one that is chosen.
    assert len(sent["checks"]) == 40 and all(check["error"] <= check["allowed"] for check in sent["checks"])
    assert "40 results of small cases agreed with the definition." in done.stdout

    right = checks.attend_dilated

    def attend_dilated(case: Case, backend: str = "auto") -> checks.Attend:
        attend = right(case, backend)
        return lambda query, key, value: attend(query, key, value) * (1.0 if backend == "portable" else 1.05)

    monkeypatch.setattr(checks, "attend_dilated", attend_dilated)
    path = tmp_path / "wrong.json"
    done = run(*command.split(), path)
    assert done.exit_code == 1
    assert "Written, with what failed: " in done.stderr and "no number is given" in done.stderr
    sent = json.loads(path.read_text())
    assert sent["failed"].startswith("CheckFailed: oracle, N=600 bfloat16: out: relative error")
    assert sent["speed"] == [] and sent["device"]["model"] == "a CPU in its place"
    assert "The run failed, and holds what was measured until then: CheckFailed" in run("show", path).stdout
    refused = run("merge", path, path, "--out", tmp_path / "merged.json")
    assert refused.exit_code == 2 and "is of a run that failed" in refused.stderr


def test_without_rich_everything_is_printed_in_plain_lines(monkeypatch, capsys, result):
    monkeypatch.setattr(terminal, "has_rich", lambda: False)
    terminal.run([harness.Step("one", lambda: None)])
    terminal.show(result)
    printed = capsys.readouterr()
    assert "rich is not installed" in printed.err
    assert "[1/1] one" in printed.err
    assert printed.out.rstrip() == report.plain(result)


def test_the_gpu_command_needs_neither_typer_nor_rich_nor_matplotlib():
    """It refuses for want of a GPU, and has imported all it needs by then."""
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'numpy'): sys.modules[name] = None\n"
        "from benchmarks.cli import main\n"
        "sys.exit(main(['gpu']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=child_environment()
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to measure")
    assert done.returncode == 2, done.stderr
    assert "needs a CUDA device" in done.stderr


def test_what_cannot_be_measured_is_refused(monkeypatch):
    assert run("gpu", "--section", "nothing").exit_code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in run("gpu").stderr
    monkeypatch.setattr(cli, "no_cuda_reason", lambda: None)
    monkeypatch.setattr(cli, "Cuda", CpuMachine)
    done = run("gpu", "--length", 4096)
    assert done.exit_code == 2
    assert "expected some of [8192, 32768, 131072, 1048576] and [64, 128]" in done.stderr
    done = run("gpu", "--commit", "not-this-one")
    assert done.exit_code == 2
    assert "commit='not-this-one'" in done.stderr


def test_only_chosen_cells_are_measured():
    chosen = harness.only(harness.cells("cuda"), "cuda", [32768], [128])
    assert [(case.length, case.head_dim, case.is_causal) for case in chosen["speed"]] == [
        (32768, 128, True),
        (32768, 128, False),
    ]


def test_a_wrong_result_gets_no_number(monkeypatch, tmp_path):
    right = checks.attend_dilated

    def attend_dilated(case: Case, backend: str = "auto") -> checks.Attend:
        attend = right(case, backend)
        return lambda query, key, value: attend(query, key, value) * 1.05

    monkeypatch.setattr(timing, "attend_dilated", attend_dilated)
    with pytest.raises(checks.CheckFailed, match="rows, N=128"):
        measure(("speed",))


def test_the_reference_is_scaled_to_the_patterns_pairs():
    machine = CpuMachine()
    for case in speed.CELLS["cuda"]:
        found = timing.reference_kind(machine, case), timing.reference_ratio(machine, case)
        assert found == (("dense", 1.0) if case.length == 8192 else ("same_flop", 1.9375))
    case = replace(GPU_QUICK, length=512)
    tensors = draw(case)
    (out,) = timing.reference(machine, case, tensors).passes["forward"]()
    assert out.shape == (4, 4, 128, 64)
    found = timing.reference(machine, case, tensors).passes["forward_backward"]()
    assert [x.shape for x in found] == [(4, 4, 128, 64)] * 4


def test_inputs_rotate_where_they_would_stay_in_the_cache():
    small = replace(GPU_QUICK, length=128)
    machine = CpuMachine()
    sets = speed.input_sets(machine, small)
    assert 4 * small.tensor_bytes * len(sets) >= 4 * machine.cache_bytes
    assert not torch.equal(sets[0].query, sets[1].query)
    machine.cache_bytes = 1
    assert len(speed.input_sets(machine, small)) == 1
    calls: list[int] = []
    turn = timing.rotated([timing.Contender("x", {"forward": lambda n=n: calls.append(n)}) for n in range(3)])
    for _ in range(4):
        turn.passes["forward"]()
    assert calls == [0, 1, 2, 0]


def test_rounds_are_interleaved_and_as_many_as_the_budget_allows():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleave(CpuMachine(), functions, 2, 5, 0.0)
    assert calls == ["a", "a", "b", "b", *"abab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert len(timing.interleave(CpuMachine(), functions, 2, 5, 1e9)["a"]) == 5


class Bounded(CpuMachine):
    """Sequences above a length run out of memory."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length


def given(machine: CpuMachine) -> Run:
    return harness.new_run(machine, "cuda-quick", {})


def test_the_longest_sequence_is_found_by_doubling_and_halving(monkeypatch):
    search = memory.Search(replace(GPU_QUICK, length=100), "forward", step=10, seconds=1e9)

    def call(device: Bounded, case: Case, which: str) -> list[checks.Check] | None:
        return [] if case.length <= device.length else None

    monkeypatch.setattr(memory, "_run", call)
    for limit in (100, 109, 110, 399, 731):
        record = memory.longest(given(Bounded(limit)), search)
        assert record["length"] == limit // 10 * 10
        assert record["fails_at"] - record["length"] == 10
    with pytest.raises(RuntimeError, match="does not fit"):
        memory.longest(given(Bounded(99)), search)
    stopped = memory.longest(given(Bounded(731)), replace(search, seconds=0.0))
    assert (stopped["length"], stopped["fails_at"]) == (100, None)


def test_out_of_memory_is_a_length_that_does_not_fit(monkeypatch):
    def nothing_left(case: Case, which: str, device: CpuMachine) -> None:
        raise torch.OutOfMemoryError("nothing left")

    monkeypatch.setattr(memory, "_draw", nothing_left)
    assert memory._run(CpuMachine(), GPU_QUICK, "forward") is None


def test_kernels_are_compiled_side_by_side_within_memory_and_failures_are_told(monkeypatch):
    started: list[Case] = []

    def start(case: Case) -> subprocess.Popen[str]:
        started.append(case)
        program = "import sys; sys.exit('no kernel')" if case.heads == 3 else "pass"
        return subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    monkeypatch.setattr(compiling, "_start", start)
    small, large = GPU_QUICK, replace(GPU, length=2**26)
    # The shorter of two that need the same kernels, and not what no memory holds.
    assert compiling.compile_kernels([small, large, replace(small, length=1024)], 1 << 34) == 1
    assert started == [small]
    with pytest.raises(RuntimeError, match="no kernel"):
        compiling.compile_kernels([replace(small, heads=3)], 1 << 34)


def test_the_full_run_compiles_no_kernel_twice():
    """Sequences of 64 blocks and of 512 share kernels; a ragged one and one beyond 32 bits do not."""
    base = GPU
    keys = {n: compiling._specialisation(replace(base, length=n)) for n in (2500, 8192, 131072, 1048576, 2097152)}
    assert keys[131072] == keys[1048576]
    assert len(set(keys.values())) == 4
    assert len({compiling._specialisation(case) for case in harness.kernel_cases(harness.cells("cuda"))}) < 24


def test_every_case_of_the_chosen_sections_is_compiled():
    full = harness.cells("cuda")
    everything = set(harness.kernel_cases(full))
    assert {*full["checks"], *full["speed"], *full["gigapath"], *full["growth"][0].cases} <= everything
    assert set(harness.kernel_cases(harness.cells("cuda", ["gigapath"]))) == {*full["checks"], *full["gigapath"]}


def test_oracle_cases_are_one_nest_as_the_timed_ones_are():
    for case in harness.cells("cuda")["checks"][:4]:
        assert len(make_nests(case.pattern, case.heads, 64, 64)) == 1
        assert case.length % min(case.segment_lengths)


def test_every_device_has_every_method():
    needed = {name for name in vars(device.Device) if not name.startswith("_")} | set(device.Device.__annotations__)
    for made in (device.Cpu(), device.HostClock(torch.device("cpu")), CpuMachine()):
        assert needed <= set(dir(made))
    # Its attributes of an instance need a GPU.
    assert needed - {"device", "cache_bytes"} <= set(dir(device.Cuda))


def test_gpu_takes_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "compile_all", lambda run: None)
    options = Namespace(
        quick=True, torchscale=None, dilated_attention_pytorch=None, alexisrozhkov=None, section=["ceilings"],
        length=[512], head_dim=None, commit=None, out=tmp_path / "c.json", plot=True,
    )  # fmt: skip
    assert cli.gpu(options, CpuMachine()) == 0
    assert json.loads((tmp_path / "c.json").read_text())["ceilings"]["matrix_side"] == 256
