"""The metrics file keeps whole lines, one a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from longnet.training.metrics import MetricsLog, read_metrics


def _write(path: Path, steps: range) -> None:
    log = MetricsLog(path, keep_to=steps.start - 1)
    for step in steps:
        log.write(kind="train", step=step, loss=1 / step)
    log.close()


def test_lines_past_the_step_and_a_half_written_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "st')
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))
    _write(path, range(5, 10))
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 10))
    assert [line["loss"] for line in read_metrics(path)] == [1 / step for step in range(1, 10)]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_to=0)
    log.write(step=1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


@pytest.mark.parametrize(("line", "message"), [(b"{broken", "line 1 is not JSON"), (b"[1]", "line 1 has no step")])
def test_a_foreign_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=message):
        read_metrics(path)


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_to=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(step=1, loss=float("nan"))
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
