"""torchrun and the processes that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# A busy machine takes minutes to start five processes.
PATIENCE = 300


def start(*arguments, python=(sys.executable,)):
    """torchrun, and what it starts, by ``python``; one host alone takes a free port, as other tests run at the same time.

    Args:
        arguments: torchrun's options, then ``-m MODULE`` or a script with its own.
    """
    place = next(n for n, word in enumerate(arguments) if word == "-m" or word.endswith(".py"))
    alone = [] if "--nnodes" in arguments else ["--standalone"]
    launch = [
        *python,
        "-m",
        "torch.distributed.run",
        *alone,
        *arguments[:place],
        "--no-python",
        *python,
        *arguments[place:],
    ]
    return subprocess.Popen(launch, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    """What it said, once it has ended."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        # They hold its output open, and would outlive it.
        for pid in workers(process):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        raise AssertionError(process.communicate()[0]) from None


def workers(process):
    """The numbers of the processes that it started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return sorted(int(pid) for pid in found.split())
