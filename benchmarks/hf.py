"""``python -m benchmarks.hf``: see :mod:`benchmarks.suites.hf`."""

from benchmarks.suites.hf import main

if __name__ == "__main__":
    main()
