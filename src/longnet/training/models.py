"""The models that a run trains: LongNets, and decoders of Hugging Face under dilated attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from longnet.checks import check_int, check_path
from longnet.models import LongNetConfig, LongNetLM
from longnet.models.layer_types import DILATED_TYPES, expand_layer_types
from longnet.training.transformer import TransformerLM
from longnet.training.transformer_config import TransformerConfig

Config: TypeAlias = LongNetConfig | TransformerConfig
Model: TypeAlias = LongNetLM | TransformerLM

# The longest first segment of the default pattern, as in LongNet, arXiv 2307.02486, section 4.1, twice.
_FIRST_SEGMENT = 4096


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of a config's ``to_dict``."""
    return TransformerConfig.from_dict(values) if "transformer" in values else LongNetConfig.from_dict(values)


def refuse_hugging_face(values: Mapping[str, Any], where: str, expected: str) -> None:
    """Raise ValueError for the ``config.json`` of a Hugging Face folder, which names its ``model_type``."""
    if "model_type" in values:
        raise ValueError(f"{where} is of Hugging Face (model_type={values['model_type']!r}): expected {expected}")


def make_model(config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
    """A model with random weights; arguments and errors as those of its class."""
    kind = TransformerLM if isinstance(config, TransformerConfig) else LongNetLM
    return kind(config, device=device, dtype=dtype)  # type: ignore[arg-type]


def open_transformer(folder: str | Path) -> TransformerConfig:
    """The config of a causal language model in a folder of ``save_pretrained``; :func:`fit_context` completes it.

    Raises:
        ValueError: a model of another kind, quantised weights, or code of its own.
        ModuleNotFoundError: transformers is missing.
    """
    from longnet.hf.causal import read_config

    if not (Path(folder) / "config.json").is_file():
        found = "holds no config.json" if Path(folder).is_dir() else "is no folder"
        raise ValueError(
            f"folder={str(folder)!r} {found}: expected a folder that save_pretrained of Hugging Face wrote"
        )
    values, options = read_config(Path(folder))
    return TransformerConfig(values, **options)


def read_transformer(folder: str | Path, context: int, **changes: Any) -> TransformerConfig:
    """The model of a run that begins with a causal language model of Hugging Face, for :class:`TrainSettings`.

    Args:
        folder: where ``save_pretrained`` wrote it; the run's ``init_from``.
        context: of the run.
        changes: fields of the result: ``segment_lengths`` and ``dilation_rates``, ``layer_types``, ``tokenizer_size``, ...
            Without a pattern the model gets that of :func:`fit_context`.

    Raises:
        TypeError, ValueError: as :func:`open_transformer`, :func:`fit_context` and :class:`TransformerConfig`.
        ModuleNotFoundError: transformers is missing.
    """
    check_int("context", context, 1)
    return fit_context(open_transformer(check_path("folder", folder)).replace(**changes), context)


def fit_context(config: TransformerConfig, context: int) -> TransformerConfig:
    """The config for windows of ``context`` tokens, with a pattern if its layers need one and it has none.

    The default pattern has segments that double from the length that the transformer was made for, at most 4,096, until one
    spans the context; rates double with them, from 1. Layers with sliding windows keep them. Dropout of attention weights
    becomes 0. ``max_position_embeddings`` is raised to the context.

    Raises:
        ValueError: positions that end before the context does, or a model that :func:`longnet.hf.apply` refuses.
    """
    from longnet.hf.causal import at_context, default_layer_types, without_attention_dropout

    changes: dict[str, Any] = {"transformer": at_context(without_attention_dropout(config.transformer), context)}
    types = config.layer_types
    if types is None and not config.segment_lengths:
        types = changes["layer_types"] = default_layer_types(config.transformer)
    if not config.segment_lengths and (types is None or set(types) & set(DILATED_TYPES)):
        lengths = [min(config.max_positions or _FIRST_SEGMENT, _FIRST_SEGMENT, context)]
        while lengths[-1] < context:
            lengths.append(2 * lengths[-1])
        changes["segment_lengths"] = tuple(lengths)
        changes["dilation_rates"] = tuple(2**number for number in range(len(lengths)))
    fitted = config.replace(**changes)
    TransformerLM(fitted, device="meta")
    return fitted


def layer_types_of(config: Config) -> tuple[str, ...]:
    """What each layer computes. Those of a transformer without a pattern are full, or read windows of their own."""
    types = config.layer_types
    if types is None and isinstance(config, TransformerConfig) and not config.segment_lengths:
        from longnet.hf.causal import default_layer_types

        own = default_layer_types(config.transformer) or DILATED_TYPES[:1]
        types = tuple("full_attention" if one in DILATED_TYPES else one for one in own)
    return expand_layer_types(types or DILATED_TYPES[:1], config.layers)
