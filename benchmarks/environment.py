"""What a number depends on besides the code: commit, versions, device, threads."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import longnet

ROOT = Path(__file__).resolve().parents[1]


def commit(told: str | None = None) -> dict[str, Any]:
    """The checkout's commit, whether anything but earlier results differs from it, and a digest of the package's sources.

    Args:
        told: the commit to name where git does not say, as in a copy without ``.git``; whether anything differs is then
            None, and the digest says what was measured.

    Raises:
        ValueError: git names another commit than ``told``.
    """
    sha = _git("rev-parse", "HEAD")
    if told is not None and sha is not None and not sha.startswith(told):
        raise ValueError(f"commit={told!r}, but this checkout is at {sha}: leave it out where git can say")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"sha": sha or told, "dirty": None if changes is None else bool(changes), "sources": sources()}


def sources() -> str:
    """SHA-256 of every file of the package, names included."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "longnet": longnet.__version__}


def gpu_versions() -> dict[str, str | None]:
    """Of what kernels are built with; None where it is missing."""
    found = importlib.util.find_spec("triton")
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "triton": None if found is None else str(importlib.import_module("triton").__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def child_environment() -> dict[str, str]:
    """For processes started here: this checkout's sources first, and byte code stays from one to the next."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**rest, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def in_child(probe: Callable[[Any], dict[str, Any]], argument: Any, **settings: str) -> dict[str, Any]:
    """``probe(argument)`` in a fresh process, with these settings in its environment.

    Raises:
        CheckFailed: as the probe does. BrokenProcessPool: the process died.
    """
    # Only a process that starts anew reads them.
    with mock.patch.dict(os.environ, settings), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(probe, argument).result()
