"""Dilated attention in a transformer of Hugging Face: put on, taken off, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import transformers
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel

from longnet.attention.backends import NAMES
from longnet.attention.definition import warn_uncovered
from longnet.checks import is_int
from longnet.geometry import HeadOffsets, Pattern
from longnet.hf import saving
from longnet.hf.bounded import BoundedCache
from longnet.hf.configuration import check_size
from longnet.hf.inputs import refuse_exported_documents, refuse_misspelt
from longnet.hf.layer_types import Settings, dilations_of
from longnet.hf.layers import ATTRIBUTE, NAME, Dilation, dilated_layers
from longnet.hf.own_configs import give_own_configs, put_back_configs
from longnet.hf.transformers_internals import (
    CACHE,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    attention_layers,
    check_model,
    check_scores,
    check_windows,
    forget_windows,
    implementation_of,
    prepare_cache_as_its_class,
    set_implementation,
    unbounded_reason,
)
from longnet.models.layer_types import DILATED_TYPES, expand_layer_types
from longnet.runtime.torch_internals import remove_pre_hook

Model = TypeVar("Model", bound=PreTrainedModel)

_NO_WEIGHTS = "output_attentions=True in a dilated model: attention weights are never made; expected False"
# Options of from_pretrained: where a folder is, and what stays the model's though configs have attributes of these names.
_WHERE = frozenset(("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"))
_OF_MODEL = frozenset(("dtype", "torch_dtype", "quantization_config", "attn_implementation"))


def apply(
    model: Model,
    segment_lengths: int | Sequence[int] | None = None,
    dilation_rates: int | Sequence[int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    layer_types: Sequence[str] | None = None,
    sliding_window: int | None = None,
    stride: int = 4,
    stride_block: int = 1,
    head_offsets: HeadOffsets = "interleaved",
    backend: str = "auto",
) -> Model:
    """Let a Hugging Face decoder or encoder attend as LongNet does (arXiv 2307.02486, section 2), in place; nothing is trained.

    Every model whose attention goes through transformers' ``AttentionInterface`` will do: it keeps its weights, positions,
    padding masks, grouped heads and packed documents (restarting ``position_ids`` separate them: segments restart, none
    sees another). In a decoder a row that is padded on the left gives what it gives alone; in an encoder padding counts
    as positions. ``generate`` gets a :class:`BoundedCache`. What
    ``save_pretrained`` writes is read by :func:`load` alone. With one branch of rate 1 and a segment as long as the
    input, nothing changes. The model gets a config of its own: a model around it, or of the same config, attends as before.

    Args:
        model: of one stack of self-attention layers, in eval or training mode. Before PEFT wraps it.
        segment_lengths: w in tokens, an int or one per branch.
        dilation_rates: r, an int or one per branch.
        layers: numbers of the attention layers to dilate, from 0; others stay as they are. None for all.
        layer_types: what each attention layer computes, in place of ``layers``; as many as layers, or a part that is repeated.
            ``"dilated_attention"`` has the pattern above, ``"shifted_dilated_attention"`` has it on a grid shifted by two
            thirds of its longest segment; both need it and the others do not. ``"sliding_attention"`` reads a window,
            ``"strided_attention"`` a window and every ``stride``-th block of ``stride_block`` keys of the whole sequence, other
            ones for each key/value head. ``"full_attention"`` reads all. A layer that is of its type already runs its own
            function.
        sliding_window: tokens, for sliding and strided layers. Default: the model's own.
        stride, stride_block: of strided layers.
        head_offsets, backend: as in :func:`longnet.dilated_attention`.

    Returns:
        The model.

    Raises:
        TypeError: no ``PreTrainedModel``, or values of wrong types. ValueError: any other bad value, and models that compute
            something else: no attention interface, cross-attention, more than one stack, sliding windows (without
            ``layer_types``) or chunks, soft-capped scores, sinks, or rotary positions that depend on a layer's type
            where that is changed. The model is then as it was. A later call raises for attention dropout in
            training, 4-D masks, attention weights as an output and static caches.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model has type {type(model).__name__}: expected a transformers.PreTrainedModel")
    if layer_types is not None and layers is not None:
        raise ValueError(
            f"layers={layers} given with layer_types, which says it of every layer: expected one of the two"
        )
    if layer_types is None:
        _refuse_settings(sliding_window=(sliding_window, None), stride=(stride, 4), stride_block=(stride_block, 1))
    pattern = _pattern(segment_lengths, dilation_rates, head_offsets, is_needed=layer_types is None)
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown: expected one of {NAMES}")
    attending = attention_layers(model)
    if any(hasattr(module, ATTRIBUTE) for module in attending):
        raise ValueError(f"{type(model).__name__} is dilated already: call longnet.hf.restore(model) first")
    check_model(model, attending)
    shared = attending[0].config
    original = implementation_of(shared)
    if original == NAME:
        raise ValueError(
            f"attn_implementation={NAME!r} was set before longnet.hf.apply: expected the implementation of layers that are not "
            "dilated, 'sdpa' or 'eager' say"
        )
    entry: dict[str, Any] = {
        "segment_lengths": [] if pattern is None else list(pattern.segment_lengths),
        "dilation_rates": [] if pattern is None else list(pattern.dilation_rates),
        "layers": None,
        "head_offsets": head_offsets,
        "attention_layers": len(attending),
    }
    if layer_types is None:
        check_windows(model, attending)
        check_scores(model, attending)
        chosen = range(len(attending)) if layers is None else _check_layers(layers, len(attending))
        entry["layers"] = None if layers is None else sorted(chosen)
        dilations = [Dilation(pattern if i in chosen else None, backend, original) for i in range(len(attending))]
    else:
        types = expand_layer_types(layer_types, len(attending))
        settings = Settings(pattern, sliding_window, stride, stride_block)
        dilations = dilations_of(model, attending, types, settings, backend, original)
        entry |= {"types": list(types), "sliding_window": sliding_window}
        entry |= {"stride": stride, "stride_block": stride_block}
    if pattern is not None and (layer_types is None or set(types) <= set(DILATED_TYPES)):
        warn_uncovered(pattern, shared.num_attention_heads)

    give_own_configs(model)
    config = attending[0].config
    try:
        replaced = [number for number, own in enumerate(dilations) if own.had_window]
        if replaced:
            entry["own"] = forget_windows(config, replaced)
        saving.mark(config, entry, model.config)
        try:
            set_implementation(model, config, NAME)
        except ValueError:
            saving.unmark(config)
            raise
    except ValueError:
        put_back_configs(model)
        raise
    saving.mark_around(shared)
    for module, own in zip(attending, dilations, strict=True):
        setattr(module, ATTRIBUTE, own)
        module.register_forward_pre_hook(_check_implementation)
    for name in _METHODS:
        # Encoders generate nothing.
        if name != "_prepare_cache_for_generation" or isinstance(model, GenerationMixin):
            model.__dict__[name] = _Own(model, name)
    model.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
    model.register_state_dict_pre_hook(saving.refuse_unmarked)
    return model


def restore(model: Model) -> Model:
    """Take :func:`apply` back: the model attends, generates and saves as it did before.

    Raises:
        ValueError: a model that is not dilated.
    """
    attending = dilated_layers(model)
    config, original = attending[0].config, getattr(attending[0], ATTRIBUTE).original
    for name in _METHODS:
        model.__dict__.pop(name, None)
    set_implementation(model, config, original)
    for module in attending:
        delattr(module, ATTRIBUTE)
        remove_pre_hook(module, _check_implementation)
    for name, value in saving.as_before(getattr(config, saving.ENTRY)).items():
        setattr(config, name, value)
    saving.unmark(config)
    put_back_configs(model)
    shared = attending[0].config
    saving.unmark_around(shared)
    if implementation_of(shared) != original:
        set_implementation(model, shared, original)
    remove_pre_hook(model, _refuse_weights)
    remove_pre_hook(model, saving.refuse_unmarked)
    return model


def load(folder: str | os.PathLike[str], model_class: type[Any] | None = None, **options: Any) -> PreTrainedModel:
    """A model that was saved dilated, dilated again. Plain ``from_pretrained`` refuses such a folder.

    Args:
        folder: what ``from_pretrained`` takes.
        model_class: of the model, by default that which was saved; Auto classes too.
        options: of ``from_pretrained``; fields of the config too. ``attn_implementation`` is that of layers which are not
            dilated, and of the model after :func:`restore`.

    Raises:
        ValueError: a folder of another kind or of sizes that no machine can make, ``config=`` or
            ``output_attentions=True``.
    """
    if "config" in options:
        raise ValueError("config given: the folder's own holds the pattern; expected its fields as options")
    if options.get("output_attentions"):
        raise ValueError(_NO_WEIGHTS)
    saved, _ = PretrainedConfig.get_config_dict(folder, **{name: options[name] for name in _WHERE & options.keys()})
    saved, entries = saving.entries(saved, folder)
    config_class = transformers.CONFIG_MAPPING[saved["model_type"]]
    # from_pretrained gives its options to a config that it reads, and to the model's constructor beside one that it gets.
    own = {name: options.pop(name) for name in _OF_MODEL & options.keys()}
    config, options = config_class.from_dict(saved, return_unused_kwargs=True, **options)
    for place in entries:
        check_size(_config_at(config, place))
    name = saved["architectures"][0]
    if model_class is None and not hasattr(transformers, name):
        raise ValueError(f"the folder holds a {name}, which is no public class of transformers: expected model_class=")
    model = (model_class or getattr(transformers, name)).from_pretrained(folder, config=config, **own, **options)
    for place, entry in entries.items():
        count = entry.pop("attention_layers")
        apply(_part(model, place, count), **entry)
    return cast(PreTrainedModel, model)


def _config_at(config: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        config = getattr(config, name, None)
    return config


def _part(model: PreTrainedModel, place: tuple[str, ...], count: int) -> PreTrainedModel:
    """The part of ``model`` with the config at ``place`` in the whole config, and ``count`` attention layers."""
    config = _config_at(model.config, place)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config and len(attention_layers(part)) == count:
            return part
    raise ValueError(
        f"{type(model).__name__} has no part of {count} attention layers with the config {'.'.join(place) or 'of its own'!r}: "
        "expected model_class= of the model that was saved"
    )


def _refuse_settings(**settings: tuple[Any, Any]) -> None:
    """Refuse what only layer types read: (value, default) by name."""
    for name, (value, default) in settings.items():
        if value != default:
            raise ValueError(f"{name}={value!r} without layer_types, which it belongs to: expected layer_types too")


def _pattern(
    segment_lengths: int | Sequence[int] | None,
    dilation_rates: int | Sequence[int] | None,
    head_offsets: HeadOffsets,
    *,
    is_needed: bool,
) -> Pattern | None:
    if not is_needed and not segment_lengths and not dilation_rates:
        return None
    if segment_lengths is None or dilation_rates is None:
        name = "segment_lengths" if segment_lengths is None else "dilation_rates"
        raise ValueError(f"{name}=None: expected an int, or one per branch")
    return Pattern.parse(segment_lengths, dilation_rates, head_offsets)


def _check_layers(layers: Sequence[int], count: int) -> set[int]:
    try:
        numbers = list(layers)
    except TypeError:
        raise TypeError(f"layers={layers!r} has type {type(layers).__name__}: expected ints or None") from None
    for number in numbers:
        if not is_int(number):
            raise TypeError(f"layers={numbers} holds {number!r} of type {type(number).__name__}: expected ints")
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) >= count:
        raise ValueError(f"layers={numbers}: expected at least one of the layers 0 to {count - 1}, each once")
    return set(numbers)


def _refuse_weights(model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A hook before forward: what some models would ignore without a word."""
    if options.get("cache") is not None and options.get("past_key_values") is not None:
        raise ValueError(
            "cache and past_key_values are both given: expected one (PEFT's prefix tuning does so up to 0.21 under transformers "
            "5.24, which then ignores the prefix)"
        )
    asked = options.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise ValueError(_NO_WEIGHTS)
    refuse_misspelt(model, options)
    refuse_exported_documents(type(model).forward, (model, *arguments), options)


def _check_implementation(module: Any, _: tuple[Any, ...]) -> None:
    """A hook before forward of an attention layer: another implementation would be dense without a word."""
    implementation = implementation_of(module.config)
    if implementation != NAME:
        raise ValueError(
            f"attn_implementation={implementation!r} was set in a dilated model: expected {NAME!r}, or "
            "longnet.hf.restore(model) before another is set"
        )


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any, **options: Any
) -> Any:
    """``generate`` asks for its cache here: a bounded one, where nothing else is asked for and nothing is rolled back.

    Models with a cache of their own kind, for layers that are no attention among others, keep it.
    """
    is_free = prepare_cache_as_its_class(self, generation_config, model_kwargs, generation_mode, *rest, **options)
    cache, attending = model_kwargs.get(CACHE), dilated_layers(self)
    if (
        is_free
        and type(cache) is DynamicCache
        and unbounded_reason(attending) is None
        and len(cache.layers) in (0, len(attending))
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    ):
        model_kwargs[CACHE] = BoundedCache(self)


def _refuse_implementation(_: Any, attn_implementation: Any, *__: Any, **___: Any) -> None:
    if attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} in a dilated model would make it dense: expected "
            "longnet.hf.restore(model) first"
        )


# Methods of a dilated model that are its own.
_METHODS: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache,
    "set_attn_implementation": _refuse_implementation,
}


class _Own:
    """One of these methods, in place of the class's. No bound method: pickle would make it the class's own again."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _METHODS[self.name](self.model, *args, **options)
