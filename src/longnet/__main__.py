"""``python -m longnet``."""

from longnet.cli.entry import main

if __name__ == "__main__":
    main()
