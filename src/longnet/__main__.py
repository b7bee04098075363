"""``python -m longnet``."""

from longnet.cli.main import run

if __name__ == "__main__":
    run()
