"""What comes with the model that a command starts from: its tokenizer, and how its run trained it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet.cli.options import Options
from longnet.training.settings import MATRIX_LR

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


def settings_of(init_from: str) -> dict[str, Any]:
    """The settings of the run at this place, by name; none where there is no run."""
    from longnet.training.files import read_json

    file = _beside(init_from, "run.json")
    return {} if file is None else read_json(file).get("settings", {})


def conversion_of(init_from: str) -> dict[str, Any]:
    """Options of ``longnet train`` for a converted run: 5 % of the run's steps, at 0.3 of its learning rates, falling.

    Source: docs/evidence.md, on conversion. None where there is no run.
    """
    from longnet.training.metrics import read_metrics

    run, metrics = settings_of(init_from), _beside(init_from, "metrics.jsonl")
    if metrics is None or "lr" not in run:
        return {}
    steps = max((line["step"] for line in read_metrics(metrics) if line["kind"] == "train"), default=0) // 20 or 1
    options = {
        "pack": run.get("pack"),
        "batch": run["batch"],
        "accumulate": run["accumulate"] if run["accumulate"] > 1 else None,
        "optimizer": run["optimizer"],
    }
    options |= {"lr": f"{0.3 * run['lr']:.3g}", "schedule": "linear", "warmup": max(1, steps // 10)}
    if run["optimizer"] == "muon":
        options["matrix-lr"] = f"{0.3 * (run['matrix_lr'] or MATRIX_LR * run['lr']):.3g}"
    return {f"--{name}": value for name, value in {"steps": steps, **options}.items() if value is not None}


def _beside(init_from: str, name: str) -> Path | None:
    """A file of the folder that a model is in. A run's folder ``checkpoint``, or a file in it, has those of the run."""
    start = Path(init_from)
    folders = [start, *(folder for folder in (start.parent, start.parent.parent) if "checkpoint" in start.parts[-2:])]
    return next((file for folder in folders if (file := folder / name).is_file()), None)
