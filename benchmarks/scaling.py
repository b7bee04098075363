"""``python -m benchmarks.scaling``: see :mod:`benchmarks.suites.scaling`."""

from benchmarks.suites.scaling import main

if __name__ == "__main__":
    main()
