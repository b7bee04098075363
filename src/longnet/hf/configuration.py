"""``LongNetConfig`` of Hugging Face: the same model under the names that its users know."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from longnet.hf.transformers_internals import allows_own_layer_types
from longnet.models import LongNetConfig as PlainConfig
from longnet.models.hf_names import ALIKE, HF_NAMES, config_of

# Far above any model, and made within minutes.
_MOST_LAYERS = 2**16


def check_size(config: PreTrainedConfig) -> None:
    """Raise ValueError for layers or weights that no machine can make, as a damaged ``config.json`` may ask for."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    sizes = {name: value for name in names if isinstance(value := getattr(config, name, None), int)}
    if sizes.get("num_hidden_layers", 0) > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={sizes['num_hidden_layers']}: expected at most {_MOST_LAYERS}")
    width = sizes.get("hidden_size", 0)
    for name in names[1:]:
        # In float64.
        if 8 * width * sizes.get(name, 0) >= 2**63:
            asked = f"hidden_size={width}" + ("" if name == "hidden_size" else f" and {name}={sizes[name]}")
            raise ValueError(f"{asked} ask for a weight larger than a tensor can be: expected smaller ones")


@allows_own_layer_types
class LongNetConfig(PreTrainedConfig):
    """Shape and options of a LongNet, see :class:`longnet.LongNetConfig` for what they mean and which values fit.

    ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size`` are its
    ``dim``, ``layers``, ``heads``, ``kv_heads`` and ``ffn_dim``, ``is_causal`` its ``causal`` and ``tie_word_embeddings`` its
    ``tie_embeddings``; all others are called alike. ``sliding_window`` is the plain config's, 512 if None; in an encoder it
    counts the keys on each side of a query, as transformers counts them: one less. The vocabulary is that of
    :class:`LongNetByteTokenizer` unless given.

    Raises:
        TypeError, ValueError: as the plain config does, when it is made. ValueError: sizes that no machine can make.
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 259
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    segment_lengths: Any = PlainConfig.segment_lengths
    dilation_rates: Any = PlainConfig.dilation_rates
    is_causal: bool = True
    norm: str = PlainConfig.norm
    qk_norm: bool = PlainConfig.qk_norm
    bias: bool = PlainConfig.bias
    dropout: float = PlainConfig.dropout
    use_xpos: bool = PlainConfig.use_xpos
    use_rel_pos_bias: bool = PlainConfig.use_rel_pos_bias
    head_offsets: str = PlainConfig.head_offsets
    xpos_scale_base: float | None = PlainConfig.xpos_scale_base
    head_numbers: Any = PlainConfig.head_numbers
    feed_forward_chunk: int | None = PlainConfig.feed_forward_chunk
    backend: str = PlainConfig.backend
    layer_types: Any = PlainConfig.layer_types
    sliding_window: int | None = None
    stride: int = PlainConfig.stride
    stride_block: int = PlainConfig.stride_block
    shift_keys: bool = PlainConfig.shift_keys
    far_positions: bool = PlainConfig.far_positions
    use_cache: bool = True
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: Any = 258
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # Where a folder says what code reads it: that was this.
        kwargs.pop("auto_map", None)
        if self.layer_types is not None and not isinstance(self.layer_types, (list, tuple)):
            # transformers would make a list of a word's letters.
            kind = type(self.layer_types).__name__
            raise TypeError(
                f"layer_types={self.layer_types!r} has type {kind}: expected a list of layer types, or None"
            )
        super().__post_init__(**kwargs)
        plain = self.to_longnet()
        # As JSON gives them back, so that a config equals the one it was saved as.
        self.segment_lengths, self.dilation_rates = list(plain.segment_lengths), list(plain.dilation_rates)
        self.num_key_value_heads = plain.heads if plain.kv_heads is None else plain.kv_heads
        self.intermediate_size = plain.feed_forward_dim
        self.head_numbers = plain.to_dict()["head_numbers"]
        self.layer_types = None if plain.layer_types is None else list(plain.layer_types)
        check_size(self)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: an installed library is not copied into folders, see :func:`longnet.hf.save_remote_code`."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def to_longnet(self) -> PlainConfig:
        """The plain library's config; raises for values that do not fit together."""
        values = {name: getattr(self, name) for name in (*HF_NAMES.values(), *ALIKE, "sliding_window")}
        try:
            return config_of(values)
        except (TypeError, ValueError) as error:
            # Name fields as they are called here.
            said = re.sub(r"\b(\w+)(?==)", lambda match: HF_NAMES.get(match[1], match[1]), str(error))
            raise type(error)(said) from None

    @classmethod
    def from_longnet(cls, config: PlainConfig, **more: Any) -> LongNetConfig:
        """The config of a plain model. ``more`` are fields that the plain library has not: token ids, labels."""
        plain = config.to_dict()
        fields = {theirs: plain[name] for name, theirs in HF_NAMES.items()}
        fields |= {name: plain[name] for name in ALIKE if name in plain}
        if config.layer_types is not None:
            fields["sliding_window"] = config.sliding_window - (not config.causal)
        if config.vocab_size <= 256:
            # Bytes alone: there are no ids for other tokens.
            fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        return cls(**{**fields, **more})
