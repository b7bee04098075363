"""Internals of transformers: private names, registries and conventions of its models. Only this file relies on them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from longnet.runtime.versions import Tried

TRIED = Tried("transformers", "5.17", "5.24")

try:
    from transformers.cache_utils import CacheLayerMixin as CacheLayerMixin
    from transformers.cache_utils import DynamicLayer as DynamicLayer
    from transformers.cache_utils import DynamicSlidingWindowLayer as DynamicSlidingWindowLayer
    from transformers.generation.configuration_utils import GenerationMode
    from transformers.loss.loss_utils import ForSequenceClassificationLoss as ForSequenceClassificationLoss
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        packed_sequence_mask_function,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto import modeling_auto
    from transformers.utils.generic import can_return_tuple as can_return_tuple
except ImportError as error:
    raise TRIED.gone(error) from error

Method = TypeVar("Method", bound=Callable[..., Any])

# What models and ``generate`` call their cache: ``past_key_values`` up to transformers 5.23, ``cache`` since.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
if CACHE not in CausalLMOutputWithPast.__dataclass_fields__:
    raise TRIED.gone("CausalLMOutputWithPast with a field cache or past_key_values")

# What transformers composes the masks of: causal or not, and packed documents. Others hide what dilated attention sees.
_MASKS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks.<locals>.and_mask",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
)
_PACKED = _MASKS[3]
# Of layers that know their own window.
_WINDOWS = (
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
)
# Models that rotate queries and keys in the layers of one type alone.
_ROTATES_BY_TYPE = ("cohere2", "exaone4", "llama4_text", "smollm3")

# What attention layers have that change scores on the way, or choose keys.
_SCORES = {
    "sinks": "attention sinks",
    "prepare_dynamic_mask": "a mask of its own",
    "relative_attention_bias": "a bias by position",
    "relative_position_bias": "a bias by position",
    "indexer": "keys chosen by an indexer",
}
# The same as options of an attention function.
_CHANGES = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "sliding_window": "a sliding window",
    "position_bias": "a bias by position",
    "output_attentions": "attention weights as an output, which are never made",
    "attention_bias": "a bias of its scores",
    "alibi": "a bias by distance",
    "head_mask": "heads left out",
    "layer_head_mask": "heads left out",
    "cross_attn_head_mask": "heads left out",
    "global_attention_mask": "global tokens, which all others see",
    "indices": "keys chosen by an indexer",
    "block_indices": "keys chosen by an indexer",
    "block_table": "a paged cache",
    "encoder_hidden_states": "cross-attention",
    "encoder_attention_mask": "cross-attention",
}
_NO_CODE = (lambda: None).__code__


def overrides(base: type) -> Callable[[Method], Method]:
    """Decorates a method that transformers calls in place of a private one of its class ``base``, which must still have it."""

    def check(method: Method) -> Method:
        TRIED.of(base, method.__name__)
        return method

    return check


def allows_own_layer_types(config_class: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Decorates a config class that checks its ``layer_types`` itself; transformers refuses types that it does not know."""
    name = "validate_layer_type"
    validators = TRIED.of(config_class, "__class_validators__")
    others = [one for one in validators if one.__name__ != name]
    if len(others) == len(validators):
        raise TRIED.gone(f"{name} among the validators of a config class")

    def validate(self: PretrainedConfig) -> None:
        for one in others:
            one(self)

    # What transformers calls before it saves a config, and after it made one: that of the class it was decorated with.
    config_class.__class_validators__, config_class.validate = others, validate  # type: ignore[attr-defined]
    return config_class


def name_classes(model_type: str, **classes: str) -> None:
    """Enter the names of a model's classes, by task, in the tables that ``register`` of an Auto class leaves out.

    Trainer shifts smoothed labels, and names a card's task, by what they hold.
    """
    for task, name in classes.items():
        TRIED.of(modeling_auto, f"MODEL_FOR_{task.upper()}_MAPPING_NAMES")[model_type] = name


# Models


def attention_layers(model: nn.Module) -> list[Any]:
    """Modules that ask transformers' interface for their attention function, in order."""
    return [
        module
        for module in model.modules()
        if "ALL_ATTENTION_FUNCTIONS" in getattr(inspect.unwrap(type(module).forward), "__code__", _NO_CODE).co_names
    ]


def attends_causally(module: nn.Module, asked: bool | None = None) -> bool:
    """Whether an attention layer is causal; ``asked`` is what it gives its attention function."""
    own = getattr(module, "is_causal", True) if asked is None else asked
    return bool(own and getattr(getattr(module, "config", None), "is_causal", True))


def check_model(model: PreTrainedModel, layers: Sequence[Any]) -> None:
    """Raise ValueError unless the model is one stack of self-attention layers."""
    kind = type(model).__name__
    if _has_cross_attention(model, layers):
        raise ValueError(f"{kind} has cross-attention: expected self-attention alone, a decoder or an encoder")
    # Where neither the class nor its layers say so, whether a layer looks ahead is known from its mask alone.
    if not layers or not (
        getattr(model, "_supports_attention_backend", False) or all(hasattr(module, "is_causal") for module in layers)
    ):
        hint = f" ({untried})" if (untried := TRIED.unknown()) else ""
        raise ValueError(f"{kind} does not use transformers' AttentionInterface: expected a model that does{hint}")
    if len({id(getattr(module, "config", None)) for module in layers}) != 1 or not hasattr(layers[0], "config"):
        raise ValueError(f"{kind} has attention layers of several configs: expected one stack, so apply to that part")
    heads = getattr(layers[0].config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"{kind} has num_attention_heads={heads!r}: expected one number, the same in all layers")


def check_windows(model: PreTrainedModel, layers: Sequence[Any]) -> None:
    """Raise ValueError unless every layer attends to all keys."""
    kind, config = type(model).__name__, layers[0].config
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types:
        raise ValueError(
            f"{kind} has layer_types {sorted(types)}: expected full attention in all layers, or layer_types="
        )
    for module in layers:
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        if window is not None:
            raise ValueError(
                f"{kind} has a sliding window of {window} tokens: expected full attention in all layers, or layer_types="
            )


def check_scores(model: PreTrainedModel, layers: Sequence[Any]) -> None:
    """Raise ValueError unless these layers are softmaxes of plain scores."""
    kind, config = type(model).__name__, layers[0].config if layers else None
    for module in layers:
        if getattr(config, "attn_logit_softcapping", None) or getattr(module, "attn_logit_softcapping", None):
            raise ValueError(f"{kind} soft-caps its scores: expected a softmax of plain scores")
        for name, what in _SCORES.items():
            if getattr(module, name, None) is not None:
                raise ValueError(
                    f"{kind} has {what} (its attention has {name!r}): expected a softmax of plain scores of all keys"
                )


def own_windows(model: PreTrainedModel, layers: Sequence[Any]) -> list[int | None]:
    """The sliding window of each layer as the model has it, None for full attention.

    Raises:
        ValueError: a layer of another type.
    """
    config = layers[0].config
    types, windows = getattr(config, "layer_types", None), []
    for number, module in enumerate(layers):
        own = types[getattr(module, "layer_idx", number)] if types else None
        if own not in (None, "sliding_attention", "full_attention"):
            raise ValueError(
                f"{type(model).__name__} has a layer of type {own!r}: expected full or sliding attention in all layers"
            )
        is_full = own == "full_attention" or getattr(module, "sliding_window", 0) is None
        windows.append(None if is_full else getattr(config, "sliding_window", None))
    return windows


def positions_by_type(config: PretrainedConfig) -> bool:
    """Whether a layer's rotary positions depend on its type."""
    given = getattr(config, "rope_parameters", None)
    by_type = [one for one in given.values() if isinstance(one, dict)] if isinstance(given, dict) else []
    return any(one != by_type[0] for one in by_type) or config.model_type in _ROTATES_BY_TYPE


def forget_windows(config: PretrainedConfig, numbers: Sequence[int]) -> dict[str, Any]:
    """Let caches and masks that are made of a config be whole for these layers.

    Returns:
        the fields that were changed, as they were.
    """
    types = getattr(config, "layer_types", None)
    if types:
        config.layer_types = ["full_attention" if i in numbers else own for i, own in enumerate(types)]
        return {"layer_types": list(types)}
    if getattr(config, "sliding_window", None) is None:
        return {}
    before, config.sliding_window = config.sliding_window, None
    return {"sliding_window": before}


def _has_cross_attention(model: PreTrainedModel, layers: Sequence[Any]) -> bool:
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return any(
        getattr(module, "is_cross_attention", False)
        or (model.config.is_encoder_decoder and getattr(module, "is_decoder", False))
        or re.search(r"cross_?att|enc(oder|dec)_?att", f"{type(module).__name__} {names[id(module)]}", re.IGNORECASE)
        for module in layers
    )


def model_that_is_saved() -> PreTrainedModel | None:
    """The model whose ``save_pretrained`` is running; None if none is."""
    frame = sys._getframe(1)
    while frame is not None:
        saved = frame.f_locals.get("self")
        if frame.f_code.co_name == "save_pretrained" and isinstance(saved, PreTrainedModel):
            return saved
        frame = frame.f_back  # type: ignore[assignment]
    return None


# Attention functions


def implementation_of(config: PretrainedConfig) -> str:
    """The name of the attention function that models of this config call."""
    name: str = TRIED.of(config, "_attn_implementation")
    return name


def set_implementation(model: PreTrainedModel, config: PretrainedConfig, name: str) -> None:
    """Let the layers of ``config`` in the model call another attention function.

    Raises:
        ValueError: the model did not take it, and calls the one that it called before.
    """
    before = implementation_of(config)
    model.set_attn_implementation(name)
    if implementation_of(config) != name:
        model.set_attn_implementation(before)
        raise ValueError(
            f"{type(model).__name__} did not take the attention implementation {name!r}: expected a model that does"
        )


def refuse_changed_scores(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that asks more of an attention function than a softmax of plain scores."""
    for name, what in _CHANGES.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(
                f"{type(module).__name__} asks for {name}, {what}: expected a layer without, or layers= that leave it as it is"
            )


def attend_by(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    packed: bool,
    window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of transformers' own function of a name, with the mask that this function would be given.

    Args:
        mask: (B, S) int64, 0 where a key is padding, else the number of its document; ``packed`` if there are several in a row.
        window: the layer's sliding window.
    """
    if window is not None:
        options["sliding_window"] = window
    if implementation == "eager":
        function = TRIED.of(sys.modules[type(module).__module__], "eager_attention_forward")
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    made: Tensor | None = None
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        length, keys = query.shape[2], key.shape[2]
        mask_function: Callable[..., Any] = causal_mask_function if causal else bidirectional_mask_function
        if window is not None:
            make = sliding_window_causal_mask_function if causal else sliding_window_bidirectional_mask_function
            mask_function = make(window)
        if packed and mask is not None:
            mask_function = and_masks(mask_function, packed_sequence_mask_function(mask))
        made = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=query.shape[0],
            q_length=length,
            kv_length=keys,
            q_offset=keys - length,
            mask_function=mask_function,
            attention_mask=None if mask is None else mask > 0,
            local_size=window,
            allow_is_causal_skip=causal and not packed,
            allow_is_bidirectional_skip=not causal and not packed,
            dtype=query.dtype,
            config=module.config,
            device=query.device,
        )
    out: tuple[Tensor, Tensor | None] = function(module, query, key, value, made, **options)
    return out


def packs_documents(mask_function: Callable[..., Any] | None, *, windows: bool) -> bool:
    """Whether a mask separates documents.

    Args:
        windows: whether layers know their windows, so that the mask may have one.

    Raises:
        ValueError: it is made of more than the causal mask and documents.
    """
    names = [] if mask_function is None else list(_names(mask_function))
    unknown = [name for name in names if name not in (*_MASKS, *_WINDOWS * windows)]
    if unknown:
        raise ValueError(
            f"the model asks for a mask made of {unknown}: dilated attention honours padding, packed documents and the causal "
            "mask; expected a model without sliding windows, chunks or masks of its own"
        )
    return _PACKED in names


def _names(function: Callable[..., Any]) -> Iterator[str]:
    """The names of a mask function and of those that it is composed of."""
    yield getattr(function, "__qualname__", repr(function))
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _names(part)


# Generation


def prepare_cache_as_its_class(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any, **options: Any
) -> bool:
    """Let ``generate`` make the cache that it makes for any model of this class.

    Returns:
        Whether it was free to make a cache of any kind, from which it takes nothing back.
    """
    is_free = (
        model_kwargs.get(CACHE) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and generation_mode != GenerationMode.ASSISTED_GENERATION
        and not getattr(generation_config, "is_assistant", False)
    )
    prepare = TRIED.of(type(model), "_prepare_cache_for_generation")
    prepare(model, generation_config, model_kwargs, generation_mode, *rest, **options)
    return is_free


def unbounded_reason(layers: Sequence[Any]) -> str | None:
    """Why a cache with one entry for each of these attention layers cannot hold what they read, if it cannot."""
    numbers = [getattr(module, "layer_idx", None) for module in layers]
    if numbers != list(range(len(layers))):
        return f"numbers its attention layers {numbers} in a cache, where a bounded cache needs 0, 1, ... and no others"
    if getattr(layers[0].config, "kv_lora_rank", None) is not None:
        return "caches a latent in place of keys and values"
    return None
