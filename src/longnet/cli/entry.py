"""Where the installed ``longnet`` command starts: it says what to install when only the library is there."""

from __future__ import annotations

import sys

# The extra that brings each. Any other module that is missing is a defect and keeps its traceback.
_EXTRAS = dict.fromkeys(("matplotlib", "numpy", "rich", "safetensors", "typer"), "train") | {"h5py": "slides"}


def main() -> None:
    """Run the command line; without a package of an extra end with exit code 2 and name it."""
    try:
        from longnet.cli.main import run

        run()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"longnet: error: the longnet command needs {error.name}, which is not installed: "
            f"pip install 'longnet-torch[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
