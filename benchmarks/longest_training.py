"""``python -m benchmarks.longest_training``: see :mod:`benchmarks.suites.longest_training`."""

from benchmarks.suites.longest_training import main

if __name__ == "__main__":
    main()
