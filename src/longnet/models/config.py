"""What a LongNet is made of: one frozen dataclass, checked when it is built, and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from longnet.checks import check_int, check_settings, check_string, refuse_unknown
from longnet.geometry import HeadNumbers, HeadOffsets, Pattern
from longnet.geometry.reach import LayerAttention
from longnet.models.layer_types import DILATED_TYPES, FAR_TYPES, expand_layer_types, pattern_of
from longnet.models.stacks import DEFAULT_STACK, STACKS
from longnet.nn.norm import NORM_KINDS


@dataclass(frozen=True)
class LongNetConfig:
    """Shape and options of a LongNet decoder or encoder. Frozen, hashable, JSON-ready through :meth:`to_dict`.

    Attributes:
        vocab_size: number of token ids; 256 for bytes.
        dim: model width C, a multiple of ``heads``.
        heads: query heads H.
        layers: number of blocks.
        ffn_dim: width of the feed-forward's hidden layer; None means ``4 * dim`` (see :attr:`feed_forward_dim`).
        segment_lengths: segment length of each branch, in tokens (LongNet section 2.3); an int for one branch.
        dilation_rates: dilation rate of each branch; an int for one branch.
        kv_heads: key/value heads of grouped-query attention, a divisor of ``heads``; None means ``heads``.
        causal: True for a decoder, False for an encoder.
        norm: ``"layer"``, ``"rms"`` or ``"batch"`` (encoders only), for every norm of the stack.
        qk_norm: whether queries and keys are normalised per head.
        bias: whether the linear layers of the blocks have a bias.
        dropout: probability in [0, 1) on the output of every attention and feed-forward, before the residual sum.
        use_xpos: xPos on queries and keys; needs an even head dimension.
        use_rel_pos_bias: a learned T5 bias per head added to the scores.
        head_offsets: ``"interleaved"`` (the paper) or ``"blocked"`` (torchscale's checkpoints).
        head_numbers: the heads that each layer has; None for all in all layers. The others were pruned, with whole
            key/value heads (see ``longnet.compress``); ``heads`` and ``kv_heads`` still count all. Not with ``norm="batch"``.
        xpos_scale_base: xPos's decay length in tokens; None lets the attention derive it from the longest segment.
        tie_embeddings: whether the language model's output head is the embedding table.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        loss_chunk: positions whose logits are held at once by the language model's loss. None: as many as have 2^24 logits, and
            4,096 at least.
        feed_forward_chunk: tokens of a row whose hidden layer (``ffn_dim`` wide, the widest of all) is held at once; it is
            computed again in the backward pass. None holds all. Not with ``norm="batch"``.
        backend: name of the attention backend, or ``"auto"``.
        layer_types: what each layer computes, one of :data:`longnet.models.layer_types.LAYER_TYPES` for every layer; a shorter
            tuple whose length divides ``layers`` is repeated. None: ``"dilated_attention"`` in all. With types of which none is
            dilated ``segment_lengths`` and ``dilation_rates`` may be ``()``.
        sliding_window: tokens of the window in sliding and strided layers: a query reads keys at distances below it.
        stride: of strided layers: each key/value head reads every ``stride``-th block of all earlier tokens.
        stride_block: tokens of such a block.
        shift_keys: in strided and full layers each key also holds what the token before was, see
            :func:`longnet.nn.shift_keys.shift_keys`.
        far_positions: False leaves out xPos in strided and full layers: what these find does not depend on how far away it is.
            The other layers still know positions. Not with ``use_rel_pos_bias``. The page on evidence says what it does.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or a combination that has no meaning.
    """

    vocab_size: int = 256
    dim: int = 768
    heads: int = 12
    layers: int = 12
    ffn_dim: int | None = None
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    kv_heads: int | None = None
    causal: bool = True
    norm: str = "layer"
    qk_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    use_xpos: bool = True
    use_rel_pos_bias: bool = False
    head_offsets: HeadOffsets = "interleaved"
    head_numbers: tuple[tuple[int, ...], ...] | None = None
    xpos_scale_base: float | None = None
    tie_embeddings: bool = True
    gradient_checkpointing: bool = False
    loss_chunk: int | None = None
    feed_forward_chunk: int | None = None
    backend: str = "auto"
    layer_types: tuple[str, ...] | None = None
    sliding_window: int = 512
    stride: int = 4
    stride_block: int = 1
    shift_keys: bool = False
    far_positions: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("norm", "head_offsets", "backend"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected a string")
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", expand_layer_types(self.layer_types, self.layers))
        # Lists from JSON and single ints become tuples: equal patterns make equal, hashable configs.
        lengths, rates = self._checked_segments()
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}: expected a multiple")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}: expected a divisor")
        object.__setattr__(self, "head_numbers", self._checked_numbers())
        if self.use_xpos and self.head_dim % 2:
            raise ValueError(
                f"use_xpos=True rotates pairs of channels, but dim={self.dim} over heads={self.heads} gives the odd "
                f"head dimension {self.head_dim}: expected an even one, or use_xpos=False"
            )
        if self.norm not in NORM_KINDS:
            raise ValueError(f"norm={self.norm!r} is not a norm: expected one of {NORM_KINDS}")
        if self.norm == "batch" and self.causal:
            raise ValueError(
                "norm='batch' with causal=True: batch statistics are taken over all tokens of a sequence and so mix "
                "future tokens into the past; expected norm='layer' or 'rms', or causal=False"
            )
        if self.norm == "batch" and self.feed_forward_chunk is not None:
            raise ValueError(
                f"feed_forward_chunk={self.feed_forward_chunk} with norm='batch': batch statistics are taken over all tokens, "
                "not over a chunk; expected None, or norm='layer' or 'rms'"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1)")
        if self.xpos_scale_base is not None and not (self.xpos_scale_base > 0 and math.isfinite(self.xpos_scale_base)):
            raise ValueError(f"xpos_scale_base={self.xpos_scale_base}: expected None or a finite number above 0")
        if not self.backend:
            raise ValueError("backend='' names nothing: expected 'auto' or the name of a backend")
        kinds = self._kinds()
        for name, default in (("shift_keys", False), ("far_positions", True)):
            if getattr(self, name) != default and not any(kind in FAR_TYPES for kind in kinds):
                raise ValueError(
                    f"{name}={not default} with layers of {kinds}: expected one of {FAR_TYPES} among them, or {name}={default}"
                )
        if not self.far_positions and self.use_rel_pos_bias:
            raise ValueError(
                "far_positions=False with use_rel_pos_bias=True: every layer has a bias of its own; expected one of the two"
            )
        for kind in kinds:
            self._pattern(kind)

    def _checked_segments(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        given = self.segment_lengths, self.dilation_rates
        if all(values in ((), []) for values in given) and not any(kind in DILATED_TYPES for kind in self._kinds()):
            return (), ()
        pattern = Pattern.parse(*given, self.head_offsets)
        return pattern.segment_lengths, pattern.dilation_rates

    def _kinds(self) -> tuple[str, ...]:
        """The types of layers that there are, each once."""
        return DILATED_TYPES[:1] if self.layer_types is None else tuple(dict.fromkeys(self.layer_types))

    def _pattern(self, kind: str) -> Pattern:
        """Of all heads of a layer of this type."""
        if kind in DILATED_TYPES:
            return Pattern.parse(self.segment_lengths, self.dilation_rates, self.head_offsets)
        pattern = pattern_of(kind, self.sliding_window, self.stride, self.stride_block)
        return pattern.grouped(self.heads, self.heads if self.kv_heads is None else self.kv_heads)

    def layer_attention(self, layer: int) -> LayerAttention:
        """What a layer computes, for the heads that it has: all that follows from its type."""
        kind = DILATED_TYPES[0] if self.layer_types is None else self.layer_types[layer]
        pattern, numbers = self._pattern(kind), self.layer_head_numbers(layer)
        if numbers is not None:
            pattern = dataclasses.replace(pattern, head_numbers=HeadNumbers.parse(numbers, self.heads))
        return LayerAttention(
            pattern,
            self.heads if numbers is None else len(numbers),
            pattern.shifted_offset if kind == "shifted_dilated_attention" else 0,
            self.shift_keys and kind in FAR_TYPES,
            self.far_positions or kind not in FAR_TYPES,
        )

    def layer_attentions(self) -> tuple[LayerAttention, ...]:
        """:meth:`layer_attention` of every layer, the first one first."""
        return tuple(self.layer_attention(layer) for layer in range(self.layers))

    def _checked_numbers(self) -> tuple[tuple[int, ...], ...] | None:
        """``head_numbers`` as tuples, None when no head is missing."""
        if self.head_numbers is None:
            return None
        if not isinstance(self.head_numbers, (list, tuple)):
            kind = type(self.head_numbers).__name__
            raise TypeError(
                f"head_numbers={self.head_numbers!r} has type {kind}: expected numbers for every layer, or None"
            )
        if len(self.head_numbers) != self.layers:
            raise ValueError(f"head_numbers are of {len(self.head_numbers)} layers: expected layers={self.layers}")
        parsed = [HeadNumbers.parse(numbers, self.heads) for numbers in self.head_numbers]
        for one in parsed:
            one.kv_heads(self.heads if self.kv_heads is None else self.kv_heads)
        if all(len(one.numbers) == self.heads for one in parsed):
            return None
        if self.norm == "batch":
            raise ValueError(
                "head_numbers with norm='batch': a pruned head's channels would be constants that differ between training "
                "and evaluation; expected norm='layer' or 'rms'"
            )
        return tuple(one.numbers for one in parsed)

    def layer_head_numbers(self, layer: int) -> tuple[int, ...] | None:
        """The heads that this layer has, None for all of them."""
        numbers = None if self.head_numbers is None else self.head_numbers[layer]
        return None if numbers is None or len(numbers) == self.heads else numbers

    @property
    def head_dim(self) -> int:
        """Channels per head, D."""
        return self.dim // self.heads

    @property
    def feed_forward_dim(self) -> int:
        """``ffn_dim`` with its default resolved."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    @classmethod
    def preset(cls, name: str, stack: str | None = None, **changes: Any) -> LongNetConfig:
        """A size by name, and a stack of layers by name, with ``changes`` to its fields.

        Args:
            name: one of :meth:`presets`. ``"base"`` is the paper's size (section 4.1); ``"tiny"`` trains on a two-core laptop;
                ``"nano"`` is for tests.
            stack: what the layers read, one of :meth:`stacks`: ``"balanced"`` (windows, and one full layer for every eight, at
                least one), ``"light"`` (windows, and every fourth key in one layer of four, at least one) or ``"longnet"`` (the
                paper's pattern). In the full and strided layers of the first two, keys are shifted and nothing is rotated. None
                is ``"balanced"``, but the paper's for ``"nano"`` and where ``layer_types``, ``segment_lengths`` or
                ``dilation_rates`` are given. The page on evidence compares them.

        Raises:
            TypeError: a name that is no string.
            ValueError: an unknown preset, stack or field, a stack beside one of these three, or values that do not fit together.
        """
        check_string("name", name)
        if stack is not None:
            check_string("stack", stack)
        if name not in _PRESETS:
            raise ValueError(f"name={name!r} is not a preset: expected one of {cls.presets()}")
        if stack is not None and stack not in STACKS:
            raise ValueError(f"stack={stack!r} is not a stack: expected one of {cls.stacks()}")
        size, window = _PRESETS[name]
        own = [field for field in ("layer_types", "segment_lengths", "dilation_rates") if field in changes]
        if own and stack not in (None, "longnet"):
            raise ValueError(f"{own[0]}={changes[own[0]]!r} with stack={stack!r}: expected one of the two")
        if stack is None:
            stack = "longnet" if own or name == "nano" else DEFAULT_STACK
        layers = check_int("layers", changes.get("layers", size.layers), 1)
        return size.replace(**{**STACKS[stack](layers, window), **changes})

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that :meth:`preset` takes, from large to small."""
        return tuple(_PRESETS)

    @classmethod
    def stacks(cls) -> tuple[str, ...]:
        """Stacks that :meth:`preset` takes."""
        return tuple(STACKS)

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON keeps as they are: tuples become lists.

        Without ``layer_types``, the fields that describe them are left out where they have their defaults.
        """
        values = {name: _lists(value) for name, value in asdict(self).items()}
        if self.layer_types is None:
            for name, default in _OF_LAYER_TYPES.items():
                if values[name] == default:
                    del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LongNetConfig:
        """The inverse of :meth:`to_dict`. Fields left out keep their defaults.

        Raises:
            ValueError: a key that is not a field, naming it.
        """
        refuse_unknown(values, _FIELDS, "LongNetConfig")
        return cls(**values)

    def replace(self, **changes: Any) -> LongNetConfig:
        """A copy with some fields changed, checked again as a whole; an unknown field is a ValueError."""
        refuse_unknown(changes, _FIELDS, "LongNetConfig")
        return dataclasses.replace(self, **changes)


_FIELDS: tuple[str, ...] = tuple(field.name for field in fields(LongNetConfig))
# Files from before there were layer types do not hold them.
_OF_LAYER_TYPES: Mapping[str, Any] = {
    field.name: field.default
    for field in fields(LongNetConfig)
    if field.name in ("layer_types", "sliding_window", "stride", "stride_block", "shift_keys", "far_positions")
}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


# With the paper's pattern, and the window of other stacks.
_PRESETS: Mapping[str, tuple[LongNetConfig, int]] = {
    "base": (LongNetConfig(qk_norm=True), 512),
    "small": (
        LongNetConfig(
            dim=512,
            heads=8,
            layers=8,
            segment_lengths=(2048, 4096, 8192, 16384),
            dilation_rates=(1, 2, 4, 8),
            qk_norm=True,
        ),
        512,
    ),
    # What two cores learn in minutes: wide rather than deep, short dense segments under one that spans the context.
    "tiny": (
        LongNetConfig(
            dim=192, heads=4, layers=3, segment_lengths=(256, 1024, 8192), dilation_rates=(1, 2, 4), qk_norm=True
        ),
        256,
    ),
    "nano": (
        LongNetConfig(dim=32, heads=4, layers=2, segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4), loss_chunk=32),
        16,
    ),
}
