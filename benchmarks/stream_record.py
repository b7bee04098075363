"""``python -m benchmarks.stream_record``: see :mod:`benchmarks.suites.stream_record`."""

from benchmarks.suites.stream_record import main

if __name__ == "__main__":
    main()
