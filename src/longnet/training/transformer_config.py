"""What a run trains that began with a Hugging Face transformer: the transformer's config, and the attention of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from longnet.checks import check_settings, refuse_unknown
from longnet.geometry.pattern import HeadOffsets, Pattern
from longnet.geometry.reach import LayerAttention


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder of Hugging Face whose layers attend as :func:`longnet.hf.apply` lets them. Immutable.

    Make it with :func:`longnet.training.read_transformer`. All fields but the first two say what the layers
    compute, and may change without a change of the parameters.

    Attributes:
        transformer: the config of transformers, as its ``to_dict`` gives it.
        tokenizer_size: how many tokens the tokenizer has; ``None`` for as many as the embedding has rows.
        segment_lengths, dilation_rates, head_offsets, layer_types, sliding_window, stride, stride_block, backend: of
            :func:`longnet.hf.apply`.
        gradient_checkpointing: whether decoder layers are computed again in the backward pass.
        loss_chunk: most positions whose logits exist at one time. None: as many as have 2^24 logits, and 4,096 at least.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or a tokenizer with more tokens than the embedding has rows.
    """

    transformer: dict[str, Any]
    tokenizer_size: int | None = None
    segment_lengths: tuple[int, ...] = ()
    dilation_rates: tuple[int, ...] = ()
    head_offsets: HeadOffsets = "interleaved"
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    stride: int = 4
    stride_block: int = 1
    backend: str = "auto"
    gradient_checkpointing: bool = False
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if not isinstance(self.transformer, dict) or "model_type" not in self.transformer:
            raise TypeError(f"transformer={self.transformer!r}: expected the dictionary of a config of transformers")
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        lengths, rates = self.segment_lengths, self.dilation_rates
        if lengths or rates:
            pattern = Pattern.parse(lengths, rates, self.head_offsets)
            lengths, rates = pattern.segment_lengths, pattern.dilation_rates
        object.__setattr__(self, "segment_lengths", tuple(lengths))
        object.__setattr__(self, "dilation_rates", tuple(rates))
        rows = self.transformer["vocab_size"]
        if self.tokenizer_size is not None and self.tokenizer_size > rows:
            raise ValueError(
                f"tokenizer_size={self.tokenizer_size}, and the {self.transformer['model_type']!r} model has an embedding of "
                f"{rows} rows: expected a tokenizer of at most {rows} tokens, as every token needs a row"
            )

    @cached_property
    def hugging_face(self) -> Any:
        """The config as a ``PretrainedConfig`` of transformers. It is shared: expected to be copied before it is changed.

        Raises:
            ModuleNotFoundError: transformers is missing.
        """
        from longnet.hf.causal import config_of

        return config_of(self.transformer)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer has; the embedding may have more rows."""
        return self.transformer["vocab_size"] if self.tokenizer_size is None else self.tokenizer_size

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return int(self.hugging_face.hidden_size)

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return int(self.hugging_face.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return int(getattr(self.hugging_face, "num_key_value_heads", None) or self.heads)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.hugging_face.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return int(getattr(self.hugging_face, "head_dim", None) or self.dim // self.heads)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the transformer was made for; ``None`` where its config does not say it."""
        return getattr(self.hugging_face, "max_position_embeddings", None)

    @property
    def causal(self) -> bool:
        """True: other models are refused."""
        return True

    @property
    def head_numbers(self) -> None:
        """None: no head is pruned."""
        return None

    def layer_attentions(self) -> tuple[LayerAttention, ...]:
        """What each layer computes, the first one first."""
        from longnet.models.layer_types import DILATED_TYPES, expand_layer_types, pattern_of

        types = expand_layer_types(self.layer_types or ("dilated_attention",), self.layers)
        dilated = (
            Pattern.parse(self.segment_lengths, self.dilation_rates, self.head_offsets)
            if self.segment_lengths
            else None
        )
        window = self.sliding_window or getattr(self.hugging_face, "sliding_window", None) or 0
        made = {}
        for kind in dict.fromkeys(types):
            offset = 0
            if kind in DILATED_TYPES:
                assert dilated is not None
                pattern, offset = dilated, dilated.shifted_offset if kind == DILATED_TYPES[1] else 0
            else:
                pattern = pattern_of(kind, window, self.stride, self.stride_block)
            made[kind] = LayerAttention(pattern.grouped(self.heads, self.kv_heads), self.heads, offset)
        return tuple(made[kind] for kind in types)

    def apply_options(self) -> dict[str, Any]:
        """The arguments of :func:`longnet.hf.apply`."""
        names = ("head_offsets", "backend", "layer_types")
        options = {name: getattr(self, name) for name in names}
        if self.segment_lengths:
            options |= {"segment_lengths": self.segment_lengths, "dilation_rates": self.dilation_rates}
        if self.layer_types is None:
            return options
        return options | {name: getattr(self, name) for name in ("sliding_window", "stride", "stride_block")}

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON keeps as they are: tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of :meth:`to_dict`. Fields left out keep their defaults.

        Raises:
            ValueError: a key that is not a field, naming it.
        """
        refuse_unknown(values, _FIELDS, "TransformerConfig")
        return cls(**values)

    def replace(self, **changes: Any) -> TransformerConfig:
        """A copy with some fields changed, checked again as a whole; an unknown field is a ValueError."""
        refuse_unknown(changes, _FIELDS, "TransformerConfig")
        return dataclasses.replace(self, **changes)


_FIELDS: tuple[str, ...] = tuple(field.name for field in fields(TransformerConfig))
