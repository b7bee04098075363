"""The run folder: its files, and loading a trained model from them."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet.compress import quantization, quantize
from longnet.models import LongNetLM
from longnet.training.checkpoint import (
    CheckpointError,
    StateKind,
    collect_weights,
    digest_tensors,
    read_safetensors,
    restore_weights,
    write_safetensors,
)
from longnet.training.data import TOKENIZER_FILES, Tokenizer, read_tokenizer, remove_prepared
from longnet.training.files import read_json, write_json
from longnet.training.lock import locked
from longnet.training.models import Config, Model, config_from_dict, make_model, refuse_hugging_face
from longnet.training.settings import TRACKERS
from longnet.training.sharded import LATEST, WHOLE, remove_others

MODEL = StateKind("model", "longnet-model", {}, digest_since=2)


class RunFolder:
    """Paths and files of one run. The constructor touches no file.

    ``run.json`` (settings, versions, facts about the data) makes a folder a run. Until it is written ``starting.json`` holds the
    settings: after a kill while data are prepared, ``--resume`` begins the run. ``data`` holds the tokens that it learns.
    ``config.json`` and ``model.safetensors`` are the model,
    ``metrics.jsonl`` the curve, ``checkpoint`` the state that ``--resume`` reads (a ``state.safetensors``, or a ``latest.json``
    and parts), and ``evaluation.json``,
    ``report.html`` and the PNGs the result. A tracker has a folder of its name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings_file = self.path / "run.json"
        self.starting_file = self.path / "starting.json"
        self.config_file = self.path / "config.json"
        self.model_file = self.path / "model.safetensors"
        self.data_folder = self.path / "data"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoint_folder = self.path / "checkpoint"
        self.checkpoint_file, self.latest_file = self.checkpoint_folder / WHOLE, self.checkpoint_folder / LATEST
        self.evaluation_file = self.path / "evaluation.json"
        self.report_file = self.path / "report.html"
        self.tracker_folders = [self.path / name for name in TRACKERS if name != "none"]

    def require_new(self) -> None:
        """Raise ValueError if a run, or a file that a run would overwrite, is there already."""
        if self.settings_file.exists():
            raise ValueError(
                f"out={str(self.path)!r} already holds a run: expected another folder, or --resume to continue this one"
            )
        own = [self.config_file, self.model_file, self.metrics_file, self.evaluation_file, self.report_file]
        existing = [file.name for file in own + self.tracker_folders if file.exists()]
        existing += [f"checkpoint/{file.name}" for file in self.checkpoint_folder.glob("*")]
        if existing:
            raise ValueError(
                f"out={str(self.path)!r} holds {existing}, which a run would overwrite: expected another folder"
            )

    @property
    def is_starting(self) -> bool:
        """Whether a run was stopped here before it began, while its data were prepared."""
        return self.starting_file.is_file() and not self.settings_file.is_file()

    def require_run(self) -> None:
        """Raise ValueError unless a run has begun here."""
        if self.settings_file.is_file():
            return
        reason = "holds no run (no run.json)" if self.path.is_dir() else "is not a folder"
        expected = "the --out folder of longnet train"
        if self.is_starting:
            reason = "holds a run that has not begun, as its data are not prepared"
            expected = f"longnet train --out {self.path} --resume first"
        elif any((self.data_folder / name).is_file() for name in ("unfinished.json", "prepared.json")):
            reason += ", only its data"
            expected = "the same command without --resume first, which goes on with them"
        raise ValueError(f"{str(self.path)!r} {reason}: expected {expected}")

    def require_resumable(self) -> None:
        """Raise ValueError unless a run has begun here, or was stopped while its data were prepared."""
        if not self.is_starting:
            self.require_run()

    def write_starting(self, settings: dict[str, Any]) -> None:
        """Write the settings of a run whose data are prepared next."""
        write_json(self.starting_file, settings)

    def require_metrics(self, steps: int = 0) -> None:
        """Raise ValueError if the curve is missing, or empty after ``steps`` steps."""
        is_missing = not self.metrics_file.is_file()
        if is_missing or (steps > 0 and self.metrics_file.stat().st_size == 0):
            raise ValueError(
                f"{self.metrics_file} is {'missing' if is_missing else 'empty'}: expected the lines of the steps that the run "
                f"in {str(self.path)!r} has done"
            )

    def write_start(self, settings: dict[str, Any], data: dict[str, Any], device: torch.device) -> None:
        """Make the folder and write ``run.json`` and ``config.json``.

        ``run.json`` comes first: after a kill in between, the folder holds a run that can be resumed.
        """
        processor = platform.processor() or platform.machine()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
        self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.settings_file,
            {
                "settings": settings,
                "data": data,
                "versions": software_versions(),
                "machine": {"device": str(device), "name": name, "system": platform.platform()},
            },
        )
        self.starting_file.unlink(missing_ok=True)
        write_json(self.config_file, settings["model"])

    def remove(self) -> None:
        """Remove the files that a run has written before its first step."""
        own = (self.starting_file, self.settings_file, self.config_file, self.model_file, self.metrics_file)
        remove_others(self.checkpoint_folder, None)
        for file in (*own, *(self.path / name for name in TOKENIZER_FILES)):
            file.unlink(missing_ok=True)
        for tracker in self.tracker_folders:
            shutil.rmtree(tracker, ignore_errors=True)
        remove_prepared(self.data_folder)
        with suppress(OSError):
            self.checkpoint_folder.rmdir()

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the run: bytes if it has saved none."""
        return read_tokenizer(self.path if (self.path / TOKENIZER_FILES[0]).is_file() else "bytes")

    def write_model(self, model: LongNetLM) -> None:
        """Write ``model.safetensors``, atomically."""
        self.write_weights(collect_weights(model), model.config, quantization(model))

    def holds_weights(self, weights: Mapping[str, Tensor], config: Config) -> bool:
        """Whether ``model.safetensors`` is whole and holds exactly these weights (on the CPU) and this config."""
        try:
            own, metadata = read_safetensors(self.model_file, MODEL)
        except CheckpointError:
            return False
        same_config = metadata.get("config", json.dumps(config.to_dict())) == json.dumps(config.to_dict())
        return same_config and own.keys() == weights.keys() and digest_tensors(own) == digest_tensors(weights)

    def write_weights(self, weights: Mapping[str, Tensor], config: Config, scheme: str | None = None) -> None:
        """Write weights that ``collect_weights`` named, as ``write_model`` does; ``scheme`` is that of quantised weights.

        The file holds the config too: its digest then covers everything that a model is loaded from.
        """
        weights = {name: tensor.to("cpu").contiguous() for name, tensor in weights.items()}
        metadata = {"config": json.dumps(config.to_dict())}
        write_safetensors(
            self.model_file, weights, MODEL, metadata if scheme is None else {**metadata, "quantization": scheme}
        )


def save_model(model: LongNetLM, path: str | Path, *, tokenizer: str | Path | None = None) -> None:
    """Write a model, pruned or quantised by ``longnet.compress`` or not, for :func:`load_model` and the commands that read runs.

    Args:
        path: a folder for ``config.json`` and ``model.safetensors``, made if it is missing.
        tokenizer: what is copied beside them, for ``longnet generate``: the run folder that the model comes from, or a
            ``tokenizer.json``; ``None`` for a model of bytes.

    Raises:
        TypeError: a model of another kind. ValueError: a run or a model is there already, a tokenizer that is not the
            model's, or weights that are neither all float32 nor all bfloat16.
    """
    if not isinstance(model, LongNetLM):
        raise TypeError(f"model has type {type(model).__name__}: expected a LongNetLM")
    dtype = _dtype_of({"embedding.weight": model.embedding.weight})
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != dtype:
            raise ValueError(
                f"{name} of the model is {weight.dtype}: expected all weights in torch.float32, or all in torch.bfloat16, which "
                "load_model gives back"
            )
    own = None if tokenizer is None else read_tokenizer(tokenizer)
    if own is not None and own.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} has {own.vocab_size} tokens, the model {model.config.vocab_size}: expected the one "
            "that it was trained with"
        )
    folder = RunFolder(path)
    with locked(path):
        folder.require_new()
        if own is not None:
            own.save(folder.path)
        write_json(folder.config_file, model.config.to_dict())
        folder.write_model(model)


def load_model(run: str | Path, device: str | torch.device = "cpu") -> LongNetLM:
    """The trained model of a run folder, or one that :func:`save_model` wrote, in evaluation mode and its weights' dtype.

    Args:
        run: the ``--out`` folder of ``longnet train``; only ``config.json`` and ``model.safetensors`` are read.
        device: where to put it.

    Raises:
        ValueError: no run, or a run that has not saved a model yet.
        CheckpointError: weights that are truncated, damaged, foreign or of another config (a ValueError too).
        ModuleNotFoundError: quantised weights, and torchao is missing.
    """
    model = load_trained(run, device)
    if not isinstance(model, LongNetLM):
        raise ValueError(
            f"{str(run)!r} holds a {type(model.model).__name__} of transformers: expected a LongNet, or longnet.hf.from_run"
        )
    return model


def load_trained(run: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a run folder, of any kind; arguments and errors as those of :func:`load_model`."""
    config, weights, metadata = read_model(run)
    with torch.random.fork_rng(devices=[]):  # Its initial weights are overwritten: leave the caller's generator alone.
        model = make_model(config, dtype=_dtype_of(weights))
        if (scheme := metadata.get("quantization")) is not None and isinstance(model, LongNetLM):
            # Quantise the initial weights: the file's tensors then fit them.
            quantize(model, scheme, head=model.head is not None and "head.weight" not in weights)
    restore_weights(model, weights, RunFolder(run).model_file)
    return model.to(device).eval()


def read_model(run: str | Path) -> tuple[Config, dict[str, Tensor], dict[str, str]]:
    """The config, the weights and the metadata that :func:`load_model` makes a model of; errors as there."""
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        folder.require_run()
        raise ValueError(f"{folder.config_file} is missing: expected the model's config, written when a run starts")
    values = read_json(folder.config_file)
    refuse_hugging_face(
        values,
        f"{str(folder.path)!r} holds no run: its model",
        "the --out folder of longnet train, or a folder of save_model",
    )
    config = config_from_dict(values)
    if not folder.model_file.is_file():
        raise ValueError(
            f"{str(folder.path)!r} holds no model yet: expected model.safetensors, written with a checkpoint"
        )
    weights, metadata = read_safetensors(folder.model_file, MODEL)
    _check_config(folder, config, weights, metadata)
    return config, weights, metadata


def _dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Of the model of these weights: bfloat16 if its embedding, the first weight of transformers' models, is; else float32."""
    embedding = weights.get("embedding.weight", next(iter(weights.values()), None))
    return torch.bfloat16 if embedding is not None and embedding.dtype == torch.bfloat16 else torch.float32


def _check_config(
    folder: RunFolder, config: Config, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Raise CheckpointError unless ``config.json`` is the config of the weights.

    The model is made only after this check, whatever size a wrong config asks for. A file of version 1 holds no config; its
    tensors give the sizes.
    """
    stated = {field.name: getattr(config, field.name) for field in fields(config)}
    if "config" in metadata:
        other = config_from_dict(json.loads(metadata["config"]))
        expected = {field.name: getattr(other, field.name) for field in fields(other)}
    else:
        names = ("embedding.weight", "blocks.0.feed_forward.sub_norm.weight")
        if missing := [name for name in names if name not in weights]:
            raise CheckpointError(f"{folder.model_file} does not fit the model: it lacks {', '.join(missing)}")
        vocab_size, dim = weights[names[0]].shape
        layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        expected = {"vocab_size": vocab_size, "dim": dim, "layers": layers, "ffn_dim": len(weights[names[1]])}
        stated["ffn_dim"] = getattr(config, "feed_forward_dim", None)
    if changes := [name for name in expected if stated.get(name) != expected[name]]:
        raise CheckpointError(
            f"{folder.config_file} does not fit {folder.model_file}: "
            f"{', '.join(f'{name}={stated.get(name)!r}, expected {expected[name]!r}' for name in changes)}"
        )


def software_versions() -> dict[str, str | None]:
    """Versions of the software that a run's numbers depend on; ``None`` for a package run from its source tree."""
    packages = ("longnet-torch", "numpy", "safetensors")
    # torch.__version__ names the build (2.11.0+cu130), the package's metadata only the release.
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
