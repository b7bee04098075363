"""One of the processes of a run, under torchrun: ``sharded_run.py OUTCOME SETTINGS``.

SETTINGS is JSON: those of the run, and ``resume``, ``fault``, ``who`` and ``own_out``. A process writes how it ended into
OUTCOME followed by its rank. A fault happens while step 6 is saved.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from longnet.training import TrainSettings, sharded, train
from longnet.training.parts import PartWriter
from longnet.training.ranks import join_ranks


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(folder):
    raise OSError(28, "No space left on device", str(folder / "part"))


def wait_for_steps(folder):
    """Until step 8 is done: too long, if training waits for the save."""
    deadline = time.monotonic() + 60
    while '"step": 8,' not in (folder.parents[1] / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, "training waits"
        assert committed(folder.parent) == 3
        time.sleep(0.01)
    (folder.parents[1] / "waited").touch()


def committed(folder):
    return json.loads((folder / "latest.json").read_text())["progress"]["step"]


def before(owner, name, act):
    """Let ``act`` come before a method of PartWriter, or a function of sharded, that writes the checkpoint of step 6."""
    method = getattr(owner, name)

    def faulty(*arguments, **named):
        folder = arguments[0] if owner is sharded else arguments[0]._folder
        if folder.name == "step-6" or (owner is sharded and committed(folder) == 6):
            act(folder)
        return method(*arguments, **named)

    setattr(owner, name, faulty)


FAULTS = {
    "killed before its part": (PartWriter, "write_data", kill),
    "killed before the commit": (PartWriter, "finish", kill),
    "killed after the commit": (sharded, "remove_others", kill),
    "disk full": (PartWriter, "write_data", fill_disk),
    "slow": (PartWriter, "write_data", wait_for_steps),
}


def main(outcome, asked):
    resume, fault, who, own_out = (asked.pop(name) for name in ("resume", "fault", "who", "own_out"))
    settings = TrainSettings.from_dict(asked)
    with join_ranks(settings.cp, "cpu") as (ranks, _):
        rank = dist.get_rank() if dist.is_initialized() else 0
        if fault and rank in who:
            before(*FAULTS[fault])
        if own_out:
            settings = settings.replace(out=f"{settings.out}{rank}")
        end = "finished"
        try:
            train(settings, resume=resume, ranks=ranks)
        except (ValueError, OSError) as error:
            end = f"{type(error).__name__}: {error}"
        Path(f"{outcome}{rank}").write_text(end)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
