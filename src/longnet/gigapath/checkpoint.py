"""Reading a slide encoder's checkpoint, without running what a pickle may hold."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.compat.names import open_containers
from longnet.gigapath.architectures import ARCHITECTURES, TILE_CHANNELS

_log = logging.getLogger("longnet")

WRAPPERS = ("module.", "_orig_mod.", "slide_encoder.", "model.", "backbone.")
"""Prefixes of names, in any number and order: DataParallel, torch.compile, and modules that hold the encoder."""

HEAD = "classifier."
"""The prefix of the linear layer in files that Prov-GigaPath's fine-tuning writes."""

_PREFIX = re.compile(f"(?:{'|'.join(map(re.escape, WRAPPERS))})+")


class Checkpoint(NamedTuple):
    """A file's tensors by upstream's names, without the prefixes of wrappers.

    Args:
        encoder: those of the slide encoder.
        head: those of a fine-tuned file's ``classifier.``; empty where there is none.
        notes: what was recognised, a sentence each, for people.
    """

    encoder: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    notes: tuple[str, ...]


def read_checkpoint(source: str | Path | Mapping[str, object]) -> Checkpoint:
    """Tensors by name, from a ``.safetensors``, any other file that ``torch.load`` reads, or a state dict.

    Containers (``{"model": ...}``, ``{"state_dict": ...}``) and the prefixes of :data:`WRAPPERS` are taken off. The notes, and
    the logger ``longnet``, say which.

    Raises:
        TypeError: something else. ValueError: a file that is neither; two tensors of one name without their prefixes.
        OSError: a file that cannot be read.
    """
    held, notes = open_containers(load_tensors(Path(source)) if isinstance(source, str | Path) else source)
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        given = f"{source} holds" if isinstance(source, str | Path) else "checkpoint is"
        raise TypeError(f"{given} a {type(held).__name__}: expected tensors by name, or the path of a file of them")
    tensors: dict[str, Any] = {}
    prefixes: dict[str, int] = {}
    for name, tensor in held.items():
        match = _PREFIX.match(name)
        prefix = match.group() if match else ""
        prefixes[prefix] = prefixes.get(prefix, 0) + 1
        if (short := name[len(prefix) :]) in tensors:
            raise ValueError(f"{name} and another tensor are both {short} without a prefix of {WRAPPERS}: expected one")
        tensors[short] = tensor
    notes += [f"took the prefix {prefix!r} off {count} names" for prefix, count in prefixes.items() if prefix]
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(HEAD)}
    if head:
        notes.append(f"found the head of a fine-tuned encoder, {', '.join(head)}")
    for note in notes:
        _log.info("checkpoint: %s", note)
    return Checkpoint(tensors, head, tuple(notes))


def channels_of(encoder: Mapping[str, Tensor]) -> int:
    """Channels of a tile embedding that the weights take: of the published encoder where they do not say it."""
    weight = encoder.get("patch_embed.proj.weight")
    return weight.shape[1] if isinstance(weight, Tensor) and weight.dim() == 2 else TILE_CHANNELS


def load_tensors(path: Path) -> Any:
    """What a ``.safetensors`` holds, or any other file for ``torch.load(weights_only=True)``, on the CPU.

    Raises:
        ValueError: a file that is neither. OSError: a file that cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist: expected a file of weights")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # What they raise for bytes that are something else is of any type; torch's advice of several lines is no help here.
        held = re.search(r"Unsupported (?:global|class|operand)[^\n]*?([\w.]+) was not an allowed", str(error))
        reason = str(error).strip().partition("\n")[0]
        if held:
            reason = f"it holds {held[1]}, which is no tensor"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or of another format"
        raise ValueError(f"{path} holds no tensors alone: {type(error).__name__}: {reason}") from None


@contextmanager
def named(source: object) -> Iterator[None]:
    """Errors of a checkpoint that is a file begin with its path."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, str | Path) or str(error).startswith(str(source)):
            raise
        raise ValueError(f"{source}: {error}") from None


def check_architecture(encoder: Mapping[str, Tensor], arch: str) -> None:
    """Refuses weights whose names and shapes are those of another published size.

    Raises:
        ValueError: such weights; the message names their architecture.
    """
    token = encoder.get("cls_token")
    if not isinstance(token, Tensor):
        return
    numbers = [match[1] for name in encoder if (match := re.match(r"encoder\.layers\.(\d+)\.", name))]
    size = (len(set(numbers)), token.shape[-1])
    likely = next((name for name, published in ARCHITECTURES.items() if published == size), None)
    if likely not in (None, arch):
        layers, dim = ARCHITECTURES[arch]
        raise ValueError(
            f"weights of {size[0]} layers of {size[1]} channels: arch={arch!r} expects {layers} of {dim}; these are "
            f"likely of arch={likely!r} (--arch)"
        )
