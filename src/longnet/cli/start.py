"""What comes with the model that a command starts from: its tokenizer, and the context of its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longnet.cli.options import Options

if TYPE_CHECKING:
    from longnet.training.data import Tokenizer


def tokenizer_of(options: Options, model: str = "--init-from") -> Tokenizer | None:
    """The one that is named or that data are prepared with; None for bytes where nothing is said.

    Where the model's own is taken, ``options`` get it. ``model`` is what the command calls ``init_from``, for messages.

    Raises:
        ValueError: two of them, or another one than that of the first weights.
    """
    from longnet.training.data import is_prepared, open_corpus, read_tokenizer

    data = options.get("data")
    first = _beside(options["init_from"], "tokenizer.json") if "init_from" in options else None
    if data is not None and is_prepared(data):
        if "tokenizer" in options:
            raise ValueError(
                f"--tokenizer with --data {data}, which is prepared: expected one of them, the data have theirs"
            )
        for name in ("field", "skip_bad_rows"):
            if name in options:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} with --data {data}, which is prepared: expected it with text alone")
        chosen = open_corpus(data, check=False).tokenizer
    elif "tokenizer" in options:
        chosen = read_tokenizer(options["tokenizer"])
    elif first is not None:
        options["tokenizer"] = str(first.parent)
        return read_tokenizer(first)
    else:
        return None
    if first is not None and read_tokenizer(first).digest != chosen.digest:
        raise ValueError(
            f"the tokenizer of {model} {options['init_from']} is another one: expected the same, as every row of the "
            "embedding belongs to one of its tokens"
        )
    return chosen


def context_of(init_from: str) -> int | None:
    """Tokens per window of the run at this place; None where none is."""
    from longnet.training.files import read_json

    file = _beside(init_from, "run.json")
    return None if file is None else read_json(file).get("settings", {}).get("context")


def _beside(init_from: str, name: str) -> Path | None:
    """A file of the folder that a model is in. A run's folder ``checkpoint``, or a file in it, has those of the run."""
    start = Path(init_from)
    folders = [start, *(folder for folder in (start.parent, start.parent.parent) if "checkpoint" in start.parts[-2:])]
    return next((file for folder in folders if (file := folder / name).is_file()), None)
