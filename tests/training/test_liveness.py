"""A process is lost while the others wait for something that will never come, as in a collective on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import torch.distributed as dist

from longnet.training import liveness

WAITS = """
import os, signal, sys, threading
from longnet.training.ranks import join_ranks
with join_ranks(1, "cpu") as (ranks, device):
    ranks.wait()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()
"""
ENDS = """
import os, signal, time
from longnet.training.ranks import join_ranks
with join_ranks(1, "cpu") as (ranks, device):
    ranks.wait()
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)  # longer than the roll call: the other has left by then, and is not lost
        print("rank 0 ended well")
"""
BUSY = """
import os, signal, time
from longnet.training.ranks import join_ranks
with join_ranks(1, "cpu") as (ranks, device):
    ranks.wait()
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)  # both, and one of them was not asked to stop
    ranks.wait()
    print("ended well")
"""
# Leaving the group waits for the other process, and so does the end of this one, as with NCCL and work on a GPU.
FAILS = """
import atexit, os, threading
import torch.distributed as dist
from longnet.training.ranks import join_ranks
dist.destroy_process_group = threading.Event().wait
atexit.register(threading.Event().wait)
with join_ranks(1, "cpu") as (ranks, device):
    ranks.wait()
    if os.environ["RANK"] == "0":
        print("before it", end="")
        raise MemoryError("of process 0")
    threading.Event().wait()
"""
FAIL_TOGETHER = """
import atexit
from longnet.training.ranks import join_ranks
atexit.register(print, "left")
with join_ranks(1, "cpu") as (ranks, device):
    ranks.agree(ValueError("of both") if ranks.is_first else None)
"""
AGAIN = """
from longnet.training.ranks import join_ranks
for number in range(3):
    with join_ranks(1, "cpu") as (ranks, device):
        ranks.wait()
    print(f"left {number}")
"""

# Process 0 kills torchrun, whose store the processes use.
ORPHANS = WAITS.replace('"1"', '"0"').replace("getpid", "getppid")


def run(tmp_path, script, processes, python):
    path = tmp_path / "script.py"
    path.write_text(script)
    launch = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    command = [*launch, *python, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_processes_that_wait_say_who_is_lost_and_end(tmp_path, forked):
    found = run(tmp_path, WAITS, 3, forked)
    assert found.returncode != 0
    assert found.stderr.count("longnet: error") == 1, found.stderr
    assert "process 1 of 3 is gone" in found.stderr, found.stderr
    # torchrun kills what is left after thirty seconds, and says so: they ended before that.
    assert "-9" in found.stderr and "forcefully exiting" not in found.stderr, found.stderr


def looking(monkeypatch, rank, ended):
    """What process ``rank`` of three finds after process 1 is lost and ``ended`` has found that, said so and ended."""
    monkeypatch.setattr(liveness, "_ANSWER_SECONDS", 0.0)
    store = dist.HashStore()
    one = liveness.Liveness.__new__(liveness.Liveness)
    one._store, one._rank, one._world, one._lock, one.is_lost = store, rank, 3, threading.Lock(), False
    store.set(f"longnet/ending/{ended}", "yes")
    return one.lost()


def test_who_looks_late_takes_no_process_for_lost_that_has_ended(monkeypatch):
    found = looking(monkeypatch, 0, ended=2)
    assert isinstance(found, liveness.LostProcess) and str(found).startswith("process 1 of 3 is gone")
    # The first of those that found it has said so.
    assert isinstance(looking(monkeypatch, 2, ended=0), SystemExit)


def test_a_process_that_left_is_not_lost(tmp_path, forked):
    found = run(tmp_path, ENDS, 2, forked)
    assert found.returncode == 0, found.stderr
    assert "rank 0 ended well" in found.stdout and "gone" not in found.stderr


def test_a_process_that_was_not_asked_to_stop_is_not_lost(tmp_path, forked):
    found = run(tmp_path, BUSY, 2, forked)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("ended well") == 2 and "gone" not in found.stderr


def test_processes_without_torchrun_say_so_once_and_end(tmp_path):
    found = run(tmp_path, ORPHANS, 2, [sys.executable])
    assert found.returncode == -9
    assert found.stderr.count("longnet: error: torchrun is gone: training stopped. --resume") == 1, found.stderr
    assert "Traceback" not in found.stderr, found.stderr


def test_processes_join_again(tmp_path, forked):
    found = run(tmp_path, AGAIN, 2, forked)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("left 2") == 2


def test_an_error_of_one_process_ends_the_others(tmp_path):
    found = run(tmp_path, FAILS, 2, [sys.executable])
    assert found.returncode == 1
    assert "MemoryError: of process 0" in found.stderr and "before it" in found.stdout, found.stderr
    assert "process 0 of 2 is gone" in found.stderr and "forcefully exiting" not in found.stderr, found.stderr


def test_processes_that_fail_together_end_as_python_does(tmp_path):
    found = run(tmp_path, FAIL_TOGETHER, 2, [sys.executable])
    assert found.returncode == 1
    assert found.stderr.count("ValueError: of both") >= 2 and "gone" not in found.stderr, found.stderr
    assert found.stdout.count("left") == 2
