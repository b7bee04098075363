"""``python -m benchmarks.compress``: see :mod:`benchmarks.suites.compress`."""

from benchmarks.suites.compress import main

if __name__ == "__main__":
    main()
