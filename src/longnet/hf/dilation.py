"""Dilated attention in a transformer of Hugging Face: put on, taken off, saved and loaded."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from longnet.attention.backends import NAMES
from longnet.attention.definition import warn_uncovered
from longnet.checks import is_int
from longnet.geometry import HeadOffsets, Pattern
from longnet.hf import saving
from longnet.hf.attend import ATTRIBUTE, NAME, Dilation
from longnet.hf.bounded import CACHE, BoundedLayer

Model = TypeVar("Model", bound=PreTrainedModel)

# What attention layers have that change scores on the way, or choose keys.
_SCORES = {
    "sinks": "attention sinks",
    "prepare_dynamic_mask": "a mask of its own",
    "relative_attention_bias": "a bias by position",
    "relative_position_bias": "a bias by position",
    "indexer": "keys chosen by an indexer",
}

_NO_CODE = (lambda: None).__code__
# Options of from_pretrained: where a folder is, and what stays the model's though configs have attributes of these names.
_WHERE = frozenset(("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"))
_OF_MODEL = frozenset(("dtype", "torch_dtype", "quantization_config", "attn_implementation"))


class BoundedCache(Cache):
    """A cache of fixed size for a decoder under :func:`apply`, as ``past_key_values``; ``generate`` makes one by itself.

    Dilated layers keep what later tokens can reach (see :class:`longnet.DilatedCache`), at most w / r keys a head in a branch
    (w, r), other layers everything. Logits are those of one forward over everything read. It takes padding before
    a row's first real token only, can be cropped within a segment, and holds no graph: read under ``torch.no_grad()``.
    After a forward that raised between two layers it refuses to go on.

    Raises:
        ValueError: a model that is not dilated, no decoder, or one whose attention layers are not all of its layers.
    """

    # PEFT asks for it: no limit.
    max_cache_len = -1

    def __init__(self, model: PreTrainedModel) -> None:
        found = _dilated_layers(model)
        if not all(getattr(module, "is_causal", True) for module in found):
            raise ValueError(f"{type(model).__name__} attends to later tokens: expected a decoder")
        reason = _unbounded_reason(found)
        if reason is not None:
            raise ValueError(f"{type(model).__name__} {reason}: expected the model's own cache")
        super().__init__(
            layers=[
                DynamicLayer() if getattr(module, ATTRIBUTE).pattern is None else BoundedLayer() for module in found
            ]
        )
        self._last_layer, self._position = -1, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer calls with the keys and values (B, Hk, T, D) of the next tokens.

        Raises:
            ValueError: the layer stands elsewhere than the first layer of this forward: an earlier forward raised half-way.
        """
        position = self.get_seq_length(layer_idx)
        if layer_idx <= self._last_layer:
            self._last_layer = -1
        if self._last_layer == -1:
            self._position = position
        elif position != self._position:
            raise ValueError(
                f"layer {layer_idx} of the cache stands at position {position} and an earlier one at {self._position}: a forward "
                "raised half-way; expected a new longnet.hf.BoundedCache, or one after reset()"
            )
        self._last_layer = layer_idx
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *rest, **options)
        return updated

    @property
    def nbytes(self) -> int:
        """Bytes of the dilated layers; the same after any number of tokens, from the first on."""
        return sum(layer.cache.nbytes for layer in self.layers if isinstance(layer, BoundedLayer) and layer.cache)


def apply(
    model: Model,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    head_offsets: HeadOffsets = "interleaved",
    backend: str = "auto",
) -> Model:
    """Let a Hugging Face decoder or encoder attend as LongNet does (arXiv 2307.02486, section 2), in place; nothing is trained.

    Every model whose attention goes through transformers' ``AttentionInterface`` will do: it keeps its weights, positions,
    masks (padding on either side counts as positions), grouped heads and packed documents (restarting ``position_ids``
    separate them: segments restart, none sees another). ``generate`` gets a :class:`BoundedCache`. What
    ``save_pretrained`` writes is read by :func:`load` alone. With one branch of rate 1 and a segment as long as the
    input, nothing changes.

    Args:
        model: of one stack of self-attention layers, in eval or training mode. Before PEFT wraps it.
        segment_lengths: w in tokens, an int or one per branch.
        dilation_rates: r, an int or one per branch.
        layers: numbers of the attention layers to dilate, from 0; others stay as they are. None for all.
        head_offsets, backend: as in :func:`longnet.dilated_attention`.

    Returns:
        The model.

    Raises:
        TypeError: no ``PreTrainedModel``, or values of wrong types. ValueError: any other bad value, and models that compute
            something else: no attention interface, cross-attention, more than one stack, sliding windows or chunks,
            soft-capped scores, sinks. The model is then as it was. A later call raises for attention dropout in
            training, 4-D masks, attention weights as an output and static caches.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model has type {type(model).__name__}: expected a transformers.PreTrainedModel")
    pattern = Pattern.parse(segment_lengths, dilation_rates, head_offsets)
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown: expected one of {NAMES}")
    found = _attention_layers(model)
    if any(hasattr(module, ATTRIBUTE) for module in found):
        raise ValueError(f"{type(model).__name__} is dilated already: call longnet.hf.restore(model) first")
    _check_model(model, found)
    chosen = range(len(found)) if layers is None else _check_layers(layers, len(found))
    config = found[0].config
    warn_uncovered(pattern, config.num_attention_heads)

    original = config._attn_implementation
    entry = {
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
        "layers": None if layers is None else sorted(chosen),
        "head_offsets": head_offsets,
        "attention_layers": len(found),
    }
    saving.mark(config, entry, model.config)
    try:
        _set_implementation(model, config, NAME, original)
    except ValueError:
        saving.unmark(config)
        raise
    for number, module in enumerate(found):
        setattr(module, ATTRIBUTE, Dilation(pattern if number in chosen else None, backend, original))
        module.register_forward_pre_hook(_check_implementation)
    # Encoders generate nothing.
    model.__dict__.update({name: _Own(model, name) for name in _METHODS if hasattr(type(model), name)})
    model.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
    model.register_state_dict_pre_hook(saving.refuse_unmarked)
    return model


def restore(model: Model) -> Model:
    """Take :func:`apply` back: the model attends, generates and saves as it did before.

    Raises:
        ValueError: a model that is not dilated.
    """
    found = _dilated_layers(model)
    config, original = found[0].config, getattr(found[0], ATTRIBUTE).original
    for name in _METHODS:
        model.__dict__.pop(name, None)
    _set_implementation(model, config, original, NAME)
    for module in found:
        delattr(module, ATTRIBUTE)
        _remove_hook(module._forward_pre_hooks, _check_implementation)
    saving.unmark(config)
    _remove_hook(model._forward_pre_hooks, _refuse_weights)
    _remove_hook(model._state_dict_pre_hooks, saving.refuse_unmarked)
    return model


def load(folder: str | os.PathLike[str], model_class: type[Any] | None = None, **options: Any) -> PreTrainedModel:
    """A model that was saved dilated, dilated again. Plain ``from_pretrained`` refuses such a folder.

    Args:
        folder: what ``from_pretrained`` takes.
        model_class: of the model, by default that which was saved; Auto classes too.
        options: of ``from_pretrained``; fields of the config too.

    Raises:
        ValueError: a folder of another kind, or ``config=``.
    """
    if "config" in options:
        raise ValueError("config given: the folder's own holds the pattern; expected its fields as options")
    saved, _ = PretrainedConfig.get_config_dict(folder, **{name: options[name] for name in _WHERE & options.keys()})
    saved, entries = saving.entries(saved, folder)
    config_class = transformers.CONFIG_MAPPING[saved["model_type"]]
    # from_pretrained gives its options to a config that it reads, and to the model's constructor beside one that it gets.
    own = {name: options.pop(name) for name in _OF_MODEL & options.keys()}
    config, options = config_class.from_dict(saved, return_unused_kwargs=True, **options)
    name = saved["architectures"][0]
    if model_class is None and not hasattr(transformers, name):
        raise ValueError(f"the folder holds a {name}, which is no public class of transformers: expected model_class=")
    made = (model_class or getattr(transformers, name)).from_pretrained(folder, config=config, **own, **options)
    for place, entry in entries.items():
        count = entry.pop("attention_layers")
        apply(_part(made, place, count), **entry)
    return made


def _part(model: PreTrainedModel, place: tuple[str, ...], count: int) -> PreTrainedModel:
    """The part of ``model`` with the config at ``place`` in the whole config, and ``count`` attention layers."""
    config: Any = model.config
    for name in place:
        config = getattr(config, name, None)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config and len(_attention_layers(part)) == count:
            return part
    raise ValueError(
        f"{type(model).__name__} has no part of {count} attention layers with the config {'.'.join(place) or 'of its own'!r}: "
        "expected model_class= of the model that was saved"
    )


def _attention_layers(model: nn.Module) -> list[Any]:
    """Modules that ask transformers' interface for their attention function, in order."""
    return [
        module
        for module in model.modules()
        if "ALL_ATTENTION_FUNCTIONS" in getattr(inspect.unwrap(type(module).forward), "__code__", _NO_CODE).co_names
    ]


def _dilated_layers(model: PreTrainedModel) -> list[Any]:
    found = _attention_layers(model)
    if not found or not all(hasattr(module, ATTRIBUTE) for module in found):
        raise ValueError(f"{type(model).__name__} is not dilated: expected a model under longnet.hf.apply")
    return found


def _unbounded_reason(found: list[Any]) -> str | None:
    """Why a :class:`BoundedCache` cannot hold what these attention layers read, if it cannot."""
    numbers = [getattr(module, "layer_idx", None) for module in found]
    if numbers != list(range(len(found))):
        return f"numbers its attention layers {numbers} in a cache, where a bounded cache needs 0, 1, ... and no others"
    if getattr(found[0].config, "kv_lora_rank", None) is not None:
        return "caches a latent in place of keys and values"
    return None


def _has_cross_attention(model: PreTrainedModel, found: list[Any]) -> bool:
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return any(
        getattr(module, "is_cross_attention", False)
        or (model.config.is_encoder_decoder and getattr(module, "is_decoder", False))
        or re.search(r"cross_?att|enc(oder|dec)_?att", f"{type(module).__name__} {names[id(module)]}", re.IGNORECASE)
        for module in found
    )


def _check_model(model: PreTrainedModel, found: list[Any]) -> None:
    kind = type(model).__name__
    if _has_cross_attention(model, found):
        raise ValueError(f"{kind} has cross-attention: expected self-attention alone, a decoder or an encoder")
    # Where neither the class nor its layers say so, whether a layer looks ahead is known from its mask alone.
    if not found or not (
        getattr(model, "_supports_attention_backend", False) or all(hasattr(module, "is_causal") for module in found)
    ):
        raise ValueError(f"{kind} does not use transformers' AttentionInterface: expected a model that does")
    if len({id(getattr(module, "config", None)) for module in found}) != 1 or not hasattr(found[0], "config"):
        raise ValueError(f"{kind} has attention layers of several configs: expected one stack, so apply to that part")
    config = found[0].config
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types:
        raise ValueError(f"{kind} has layer_types {sorted(types)}: expected full attention in all layers")
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"{kind} has num_attention_heads={heads!r}: expected one number, the same in all layers")
    for module in found:
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        if window is not None:
            raise ValueError(f"{kind} has a sliding window of {window} tokens: expected full attention in all layers")
        if getattr(config, "attn_logit_softcapping", None) or getattr(module, "attn_logit_softcapping", None):
            raise ValueError(f"{kind} soft-caps its scores: expected a softmax of plain scores")
        for name, what in _SCORES.items():
            if getattr(module, name, None) is not None:
                raise ValueError(
                    f"{kind} has {what} (its attention has {name!r}): expected a softmax of plain scores of all keys"
                )


def _check_layers(layers: Sequence[int], count: int) -> set[int]:
    try:
        given = list(layers)
    except TypeError:
        raise TypeError(f"layers={layers!r} has type {type(layers).__name__}: expected ints or None") from None
    for number in given:
        if not is_int(number):
            raise TypeError(f"layers={given} holds {number!r} of type {type(number).__name__}: expected ints")
    if not given or len(set(given)) < len(given) or min(given) < 0 or max(given) >= count:
        raise ValueError(f"layers={given}: expected at least one of the layers 0 to {count - 1}, each once")
    return set(given)


def _refuse_weights(model: Any, _: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A hook before forward: some models would give no attention weights, or read one cache of two, without a word."""
    if options.get("cache") is not None and options.get("past_key_values") is not None:
        raise ValueError(
            "cache and past_key_values are both given: expected one (PEFT's prefix tuning does so up to 0.21 under transformers "
            "5.24, which then ignores the prefix)"
        )
    asked = options.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise ValueError("output_attentions=True in a dilated model: attention weights are never made; expected False")


def _check_implementation(module: Any, _: tuple[Any, ...]) -> None:
    """A hook before forward of an attention layer: another implementation would be dense without a word."""
    implementation = module.config._attn_implementation
    if implementation != NAME:
        raise ValueError(
            f"attn_implementation={implementation!r} was set in a dilated model: expected {NAME!r}, or "
            "longnet.hf.restore(model) before another is set"
        )


def _remove_hook(hooks: dict[int, Callable[..., Any]], function: Callable[..., None]) -> None:
    # By function, not by its handle: a copy of a model has hooks of its own. Flags that torch holds beside a hook do nothing.
    for number in [number for number, hook in hooks.items() if hook is function]:
        del hooks[number]


def _set_implementation(model: PreTrainedModel, config: PretrainedConfig, name: str, before: str) -> None:
    model.set_attn_implementation(name)
    if config._attn_implementation != name:
        model.set_attn_implementation(before)
        raise ValueError(
            f"{type(model).__name__} did not take the attention implementation {name!r}: expected a model that does"
        )


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any, **options: Any
) -> Any:
    """``generate`` asks for its cache here: a bounded one, where nothing else is asked for and nothing is rolled back.

    Models with a cache of their own kind, for layers that are no attention among others, keep it.
    """
    bounded = (
        model_kwargs.get(CACHE) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and generation_mode != GenerationMode.ASSISTED_GENERATION
        and not getattr(generation_config, "is_assistant", False)
    )
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *rest, **options)
    made, found = model_kwargs.get(CACHE), _dilated_layers(self)
    if (
        bounded
        and type(made) is DynamicCache
        and _unbounded_reason(found) is None
        and len(made.layers) in (0, len(found))
        and all(type(layer) is DynamicLayer for layer in made.layers)
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
