"""What a number depends on besides the code: commit, versions, device, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import longnet

ROOT = Path(__file__).resolve().parents[1]


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether anything but earlier results differs from it. None where git does not say."""
    sha = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"sha": sha, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "longnet": longnet.__version__}


def device() -> dict[str, Any]:
    """The processor as the system names it, cores this process may use, torch's threads, the load before the run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kind": "cpu",
        "model": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that ran or waited to, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def child_environment() -> dict[str, str]:
    """For processes started here: this checkout's sources first, and byte code kept from one to the next."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"
