"""An error that all processes of torchrun end with is said by the first one alone."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import timedelta

# Seconds that another process waits to hear whether the first one ends with the same error.
_PATIENCE = 5.0


def error_text(error: Exception) -> str:
    """An error as one line; of one of the system the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def say_once(text: str) -> None:
    """Print a line on standard error, unless the first process of torchrun prints the same one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        print(text, file=sys.stderr)
        return
    is_first = os.environ.get("RANK") == "0"
    if is_first:
        print(text, file=sys.stderr, flush=True)
    # The store of torchrun itself: it is there before and after the processes' own group. Where it fails each process prints.
    said = None
    with suppress(Exception):
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=_PATIENCE))
        key = f"longnet/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if is_first:
            store.set(key, text)
        else:
            said = store.get(key).decode()
    if not is_first and said != text:
        print(text, file=sys.stderr)
