"""Where the ``longnet`` command starts: threads are set up before torch is imported, and a missing extra is named."""

from __future__ import annotations

import os
import sys

# The extra that brings each. Any other module that is missing is a defect and keeps its traceback.
_EXTRAS = dict.fromkeys(("matplotlib", "numpy", "rich", "safetensors", "typer"), "train") | {"h5py": "slides"}

# OpenMP reads these when torch is imported. Threads that wait for the next operation then sleep instead of spinning: beside any
# other load, spinning threads take the processor from those that compute.
THREAD_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def main() -> None:
    """Run the command line; without a package of an extra end with exit code 2 and name it."""
    for name, value in THREAD_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        from longnet.cli.main import run

        run()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"longnet: error: the longnet command needs {error.name}, which is not installed. "
            f"In a checkout of longnet: pip install '.[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
