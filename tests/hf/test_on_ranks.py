"""LongNets of longnet.hf over two processes: Trainer's data parallelism, and parameters sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_on_ranks
from longnet_models import first, make, tokens

from longnet.hf import LongNetForCausalLM

PLACE = Path(__file__).parent


def on_two_ranks(mode: str, folder: Path, python: list[str]) -> tuple[list[float], Any]:
    """(losses, the model) of two processes that torchrun starts by ``python``."""
    paths = os.pathsep.join([str(PLACE), *(path for path in sys.path if path)])
    launch = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*launch, *python, str(PLACE / "train_on_ranks.py"), mode, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "losses.json").read_text()), LongNetForCausalLM.from_pretrained(folder)


def same(found: Any, expected: Any) -> None:
    """Logits to what four steps of Adam make of other rounding."""
    given = first(found, input_ids=tokens()), first(expected.eval(), input_ids=tokens())
    torch.testing.assert_close(*given, rtol=1e-2, atol=1e-3)


def test_data_parallel(tmp_path: Path, forked: list[str]) -> None:
    """Two ranks with half a batch each take the steps of one process with the whole batch."""
    alone = train_on_ranks.trainer(tmp_path / "alone", train_on_ranks.BATCH)
    alone.train()
    losses, model = on_two_ranks("ddp", tmp_path / "two", forked)
    assert losses == pytest.approx(train_on_ranks.losses(alone), rel=1e-4)
    torch.testing.assert_close(
        first(model, input_ids=tokens()), first(alone.model.eval(), input_ids=tokens()), rtol=1e-2, atol=1e-3
    )


def test_sharded_parameters(tmp_path: Path, forked: list[str]) -> None:
    """FSDP2 around every block and the whole, tied embedding included, takes the same steps."""
    alone = make().train()
    train_on_ranks.train(alone)
    losses, model = on_two_ranks("fsdp2", tmp_path, forked)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(
        first(model, input_ids=tokens()), first(alone.eval(), input_ids=tokens()), rtol=1e-2, atol=1e-3
    )
