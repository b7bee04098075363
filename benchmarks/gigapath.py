"""``python -m benchmarks.gigapath``: see :mod:`benchmarks.suites.slide_encoder`."""

from benchmarks.suites.slide_encoder import main

if __name__ == "__main__":
    main()
