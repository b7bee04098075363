"""``python -m benchmarks``: measures the sources of this checkout, whatever is installed."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    # The result names a commit, so the code measured has to be the code beside this file.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from benchmarks.cli import main

    raise SystemExit(main())


if __name__ == "__main__":
    main()
