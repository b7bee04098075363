"""Causal language models in folders of ``save_pretrained``, for ``longnet train``: what is refused, and their weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from longnet.hf import saving
from longnet.hf.bounded import BoundedCache
from longnet.hf.layers import dilated_layers
from longnet.hf.transformers_internals import (
    attends_causally,
    attention_layers,
    check_model,
    own_windows,
    unbounded_reason,
)

# What configs call the dropout of attention weights, which dilated attention does not have.
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Rotary positions that are the same at any length.
_ANY_LENGTH = ("default", "linear", "llama3")
# Tables of positions have a few rows more than positions in some models (OPT).
_SPARE_ROWS = 8


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a causal language model in a folder, as plain values, and the arguments of ``apply`` it was saved with.

    Raises:
        ValueError: a model of another kind, quantised weights, or code of its own.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    where, options = f"init_from={str(folder)!r}", {}
    if isinstance(values.get(saving.ENTRY), dict):
        values, entries = saving.entries(values, folder)
        options = entries.pop((), {})
        layers = options.pop("layers", None)
        if entries or layers is not None:
            what = f"layers={layers}" if layers is not None else f"parts {sorted('.'.join(place) for place in entries)}"
            raise ValueError(
                f"{where} was dilated in {what} alone: expected a model dilated as a whole, or by layer_types"
            )
        options.pop("attention_layers", None)
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{where} is of model_type={kind!r}: expected one that this transformers knows; code in the folder is not run"
        )
    if values.get("quantization_config") is not None:
        method = values["quantization_config"].get("quant_method")
        raise ValueError(f"{where} holds quantised weights ({method}): expected float32, bfloat16 or float16")
    config = CONFIG_MAPPING[kind].from_dict(values)
    if config.is_encoder_decoder:
        raise ValueError(f"{where} is an encoder-decoder (model_type={kind!r}): expected a decoder alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{where} is of model_type={kind!r}, which has no causal language model: expected one, such as Llama"
        )
    made = make_causal_lm(copy.deepcopy(config), "meta", torch.float32)
    if not all(attends_causally(layer) for layer in attention_layers(made)):
        raise ValueError(
            f"{where} is an encoder (model_type={kind!r}): expected a decoder, as the next token is predicted"
        )
    return as_plain(config), options


def as_plain(config: PretrainedConfig) -> dict[str, Any]:
    """The config as values that JSON keeps as they are."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in plain.items() if name != "transformers_version"}


def config_of(values: dict[str, Any]) -> PretrainedConfig:
    """The inverse of :func:`as_plain`."""
    return CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))


def make_causal_lm(config: PretrainedConfig, device: torch.device | str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights of this dtype; buffers are those that transformers makes."""
    with torch.device(device or "cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def without_attention_dropout(values: dict[str, Any]) -> dict[str, Any]:
    """The config without dropout of attention weights, which ``apply`` refuses in training."""
    return {name: 0.0 if name in _ATTENTION_DROPOUT else value for name, value in values.items()}


def at_context(values: dict[str, Any], context: int) -> dict[str, Any]:
    """The config for windows of ``context`` tokens: its ``max_position_embeddings`` is raised where positions are rotary.

    Raises:
        ValueError: positions that end before: a table of them, or rotary ones that change with the length.
    """
    config = config_of(values)
    most = getattr(config, "max_position_embeddings", None)
    if most is None or context <= most:
        return values
    kind, model = values["model_type"], make_causal_lm(copy.deepcopy(config), "meta", torch.float32)
    tokens = model.get_input_embeddings()
    tables = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module is not tokens
    } | {name: buffer.shape for name, buffer in model.named_buffers() if buffer.ndim == 2}
    for name, shape in tables.items():
        if most <= shape[0] <= most + _SPARE_ROWS:
            raise ValueError(
                f"context={context} is longer than the {most} positions that the {kind!r} model has a table of ({name}): "
                f"expected at most {most}"
            )
    given = getattr(config, "rope_parameters", None) or {}
    ropes = [given] if "rope_type" in given else [one for one in given.values() if isinstance(one, dict)]
    types = {one.get("rope_type", "default") for one in ropes}
    if other := sorted(types - set(_ANY_LENGTH)):
        raise ValueError(
            f"context={context} is longer than max_position_embeddings={most} of the {kind!r} model, whose rotary positions "
            f"are of rope_type={other[0]!r}, which depends on the length: expected at most {most}, or a config.json with another "
            "max_position_embeddings"
        )
    return {**values, "max_position_embeddings": context}


def default_layer_types(values: dict[str, Any]) -> tuple[str, ...] | None:
    """``"sliding_attention"`` for layers with a window, ``"dilated_attention"`` for others; None if all are of these.

    Raises:
        ValueError: a model whose attention :func:`longnet.hf.apply` cannot change.
    """
    model = make_causal_lm(config_of(values), "meta", torch.float32)
    layers = attention_layers(model)
    check_model(model, layers)
    windows = own_windows(model, layers)
    if not any(windows):
        return None
    return tuple("dilated_attention" if window is None else "sliding_attention" for window in windows)


def read_weights(folder: Path, values: dict[str, Any]) -> dict[str, Tensor]:
    """The ``state_dict`` of the model in a folder, in the folder's dtype; a tied weight once.

    Raises:
        ValueError: a file that is missing or damaged, or weights that are not those of the model.
    """
    _check_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config_of(values),
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in {str(folder)!r} do not fit its config.json: {error}") from None
    model, report = loaded
    for name, what in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds unknown"),
        ("mismatched_keys", "holds in another shape"),
    ):
        if keys := sorted(map(str, report.get(name) or ())):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{str(folder)!r} {what} {', '.join(keys[:3])}{more}: expected the weights of a {type(model).__name__}"
            )
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach().contiguous()
    return weights


def _check_files(folder: Path) -> None:
    """Raise ValueError for a missing or truncated file, with its name; transformers does not name it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is not there: expected the safetensors that save_pretrained writes")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged: {error}") from None


def new_cache(model: PreTrainedModel) -> Cache:
    """A cache for generation with a dilated model: a bounded one, where its layers allow that."""
    if unbounded_reason(dilated_layers(model)) is None:
        return BoundedCache(model)
    return DynamicCache()
