"""The worked example of long fine-tuning runs, and writes what it says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_long.py"


def test_a_dense_model_goes_on_longer(tmp_path: Path, forked_hf: tuple[list[str], Path]) -> None:
    command = [*forked_hf[0], str(EXAMPLE), "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "finetune_long.json").read_text())
    assert (tmp_path / "finetune_long.png").read_bytes().startswith(b"\x89PNG")
    dense, dilated = result["stages"]["dense"], result["stages"]["dilated"]
    assert (dense["context"], dilated["context"]) == (64, 256)
    assert dense["losses"][0] > 7.5 > dilated["losses"][-1]
    assert all(stage["tokens_per_second"] > 0 for stage in (dense, dilated))
    scores = result["held_out_bits_per_byte"]
    assert set(scores) == {"dense", "dilated, before training", "dilated"}
    assert all(0 < score < 8 for by_context in scores.values() for score in by_context.values())
    assert scores["dilated"]["256"] < scores["dense"]["256"]
