"""What the fields of a config are called in Hugging Face's folders. Needs no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet.checks import check_int
from longnet.models.config import LongNetConfig

HF_NAMES = {
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "causal": "is_causal",
    "tie_embeddings": "tie_word_embeddings",
}
"""Ours and theirs; what is called alike in both stands in :data:`ALIKE`."""
ALIKE = (
    *("vocab_size", "segment_lengths", "dilation_rates", "norm", "qk_norm", "bias", "dropout", "use_xpos"),
    *("use_rel_pos_bias", "head_offsets", "xpos_scale_base", "head_numbers", "feed_forward_chunk", "backend"),
    *("layer_types", "stride", "stride_block", "shift_keys", "far_positions"),
)


def config_of(values: Mapping[str, Any]) -> LongNetConfig:
    """The config of a LongNet's ``config.json`` of Hugging Face. Fields left out have their defaults, others are not looked at.

    Raises:
        TypeError, ValueError: as :class:`LongNetConfig`.
    """
    names = {**HF_NAMES, **{name: name for name in ALIKE}}
    known = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    if (window := values.get("sliding_window")) is not None:
        # An encoder's counts the keys on each side there, without the query's own.
        known["sliding_window"] = check_int("sliding_window", window) + (not known.get("causal", True))
    return LongNetConfig(**known)
