"""Where the installed ``longnet`` command starts: it says what to install when only the library is there."""

from __future__ import annotations

import sys

# Of the extra `train`. Any other module that is missing is a defect and keeps its traceback.
_EXTRA = ("matplotlib", "numpy", "rich", "safetensors", "typer")


def main() -> None:
    """Run the command line; without the packages of the extra ``train`` end with exit code 2 and name it."""
    try:
        from longnet.cli.main import run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            f"longnet: error: the longnet command needs {error.name}, which is not installed: "
            "pip install 'longnet-torch[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
