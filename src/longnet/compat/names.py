"""torchscale's parameter names and ours, one map used both ways, and a check that lists what does not fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger("longnet")

_CONTAINERS = ("model", "state_dict")
# Keys of each kind that an error shows.
_SHOWN = 4

# Modules of one layer: ours, theirs.
_LAYER = {
    "attention_norm": "self_attn_layer_norm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.out_proj",
    "attention.sub_norm": "self_attn.inner_attn_ln",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.fc1": "ffn.fc1",
    "feed_forward.sub_norm": "ffn.ffn_layernorm",
    "feed_forward.fc2": "ffn.fc2",
}


def open_containers(held: Any) -> tuple[Any, list[str]]:
    """What lies in ``{"model": ...}`` and ``{"state_dict": ...}``, in any depth; a note for each that was opened."""
    notes = []
    while isinstance(held, Mapping) and (
        found := [name for name in _CONTAINERS if isinstance(held.get(name), Mapping)]
    ):
        notes.append(f"took the tensors in {found[0]!r}")
        held = held[found[0]]
    return held, notes


def unwrap(weights: Mapping[str, Tensor], layers: str) -> Mapping[str, Tensor]:
    """Weights out of containers, and without what stands in front of ``layers`` where it does in front of all keys."""
    weights, notes = open_containers(weights)
    names = [name for name in weights if isinstance(name, str)]
    first = next((name[: name.index(layers)] for name in names if f".{layers}" in name), "")
    if first and len(names) == len(weights) and all(name.startswith(first) for name in names):
        notes.append(f"took the prefix {first!r} off all names")
        weights = {name.removeprefix(first): tensor for name, tensor in weights.items()}
    for note in notes:
        _log.info("weights: %s", note)
    return weights


def module_names(layers: int, prefix: str = "", ours: str = "", **more: str) -> dict[str, str]:
    """Our modules' names to torchscale's, for a stack of ``layers`` blocks.

    Args:
        prefix, ours: of torchscale's ``layers`` and of our ``blocks``, ``"encoder."`` say.
        more: modules (or parameters) outside of the stack, ours to theirs.
    """
    names = dict(more)
    for layer in range(layers):
        names |= {f"{ours}blocks.{layer}.{one}": f"{prefix}layers.{layer}.{other}" for one, other in _LAYER.items()}
    return names


def to_theirs(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The model's state dict in torchscale's names; what ``names`` leaves out is left out. Tensors are shared, not copied.

    Raises:
        ValueError: a module that is not there, or that holds more than its own parameters: it was wrapped or has an adapter.
    """
    tensors = {}
    for ours, theirs in names.items():
        parent, _, name = ours.rpartition(".")
        try:
            one = getattr(model.get_submodule(parent), name)
        except AttributeError as error:
            raise ValueError(f"{ours} is not in the model ({error}): expected no wrapped or replaced blocks") from None
        if isinstance(one, nn.Parameter):
            tensors[theirs] = one.detach()
        elif one is not None:
            for name, tensor in one.state_dict().items():
                if "." in name:
                    raise ValueError(f"{ours} holds {name}: torchscale has no such parameter, expected merged adapters")
                tensors[f"{theirs}.{name}"] = tensor
    return tensors


def load_theirs(model: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copy a state dict in torchscale's names into the model.

    Raises:
        TypeError: a value that is no tensor.
        ValueError: keys that are missing, unexpected or of another shape: how many, the first few, and the prefix in front of
            names that would fit without it.
    """
    expected = to_theirs(model, names)
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weights[{name!r}] has type {type(tensor).__name__}: expected a tensor")
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if said := "; ".join(f"{kind}: {_first_few(keys)}" for kind, keys in lists.items() if keys):
        raise ValueError(f"weights do not fit the model; {said}{_likely_prefix(unexpected, expected)}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])


def _first_few(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _likely_prefix(names: Sequence[str], expected: Mapping[str, Tensor]) -> str:
    """The prefix that most names have in front of an expected one, in words; empty where there is none."""
    found = Counter(
        name[: dot + 1]
        for name in names
        for dot in range(len(name))
        if name[dot] == "." and name[dot + 1 :] in expected
    )
    if not found:
        return ""
    ((prefix, count),) = found.most_common(1)
    return f"; {count} of the unexpected names fit without their prefix {prefix!r}: take it off the keys"
