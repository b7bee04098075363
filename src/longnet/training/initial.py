"""The weights that a run begins with: of another run, a saved model, a checkpoint file or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from longnet.models.hf_names import config_of
from longnet.models.layer_types import DILATED_TYPES
from longnet.training.checkpoint import CheckpointError, collect_weights, digest_tensors
from longnet.training.files import read_json
from longnet.training.folder import read_model
from longnet.training.models import Config, Model, config_from_dict, make_model, open_transformer
from longnet.training.settings import TrainSettings, changed_fields
from longnet.training.sharded import LATEST, WHOLE, read_saved
from longnet.training.transformer_config import TransformerConfig

# These decide which parameters there are, or which of a parameter's rows belong together. All other fields may change.
_FIXED = (
    *("vocab_size", "dim", "heads", "layers", "ffn_dim", "kv_heads", "causal", "norm", "qk_norm", "bias"),
    *("use_rel_pos_bias", "head_numbers", "tie_embeddings"),
    # Of transformers.
    *(
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "n_head",
        "head_dim",
        "hidden_act",
        "activation_function",
    ),
)
_SHOWN = 3


def open_initial(path: str) -> tuple[Config, Callable[[], dict[str, Tensor]]]:
    """The config of the model at ``path``, and a function that reads its weights, by the names of ``collect_weights``.

    Raises (the function too):
        ValueError: nothing there, a model of another kind (no decoder, say), quantised weights.
        CheckpointError: a file that is missing, truncated, damaged or of a future format (a ValueError too).
        ModuleNotFoundError: a model of transformers, and that is missing.
    """
    place = Path(path)
    if not (place / "config.json").is_file():
        # A run's folder ``checkpoint``.
        place = next((place / name for name in (LATEST, WHOLE) if (place / name).is_file()), place)
    if place.is_file():
        try:
            checkpoint = read_saved(place)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (init_from takes a folder, or a run's checkpoint/state.safetensors or latest.json)"
            ) from None
        return config_from_dict(checkpoint.progress["settings"]["model"]), checkpoint.weights
    if not (place / "config.json").is_file():
        found = "holds no config.json" if place.is_dir() else "is not there"
        raise ValueError(
            f"init_from={path!r} {found}: expected a run folder of longnet train, a folder of save_model, a run's "
            "folder checkpoint, or a folder that save_pretrained of Hugging Face wrote"
        )
    values = read_json(place / "config.json")
    kind = values.get("model_type")
    if kind == "longnet":
        return config_of(values), lambda: _hugging_face_weights(place)
    if kind is not None:
        transformer = open_transformer(place)
        return transformer, lambda: _transformer_weights(place, transformer)

    def read() -> dict[str, Tensor]:
        _, weights, metadata = read_model(path)
        if scheme := metadata.get("quantization"):
            raise ValueError(f"init_from={path!r} holds quantised weights ({scheme}): expected float32 or bfloat16")
        return weights

    return config_from_dict(values), read


def read_initial(
    settings: TrainSettings,
    saved: TrainSettings | None,
    restored: bool,
    tokenizer: str,
    say: Callable[[str], None],
) -> tuple[TrainSettings, dict[str, Tensor]]:
    """The settings with the digest of the first weights, and these weights; none if they are random or not read.

    Args:
        settings: of the run; nothing is read where ``init_from`` is None.
        saved: those of the run that is resumed. Another path than its own must hold the same weights.
        restored: whether a checkpoint holds later weights. Its run's own path is then not read again.
        tokenizer: of the data, in words.
        say: is told what changes: a line for every field of the config.

    Raises:
        ValueError: as :func:`open_initial`, weights with another digest, a path inside ``out``, weights that do not fit.
    """
    path, digest = settings.init_from, settings.init_digest
    if saved is not None:
        digest = digest or saved.init_digest
    if path is None or (restored and saved is not None and path == saved.init_from):
        return settings.replace(init_digest=digest), {}
    if saved is None and Path(path).resolve().is_relative_to(Path(settings.out).resolve()):
        raise ValueError(f"init_from={path!r} lies in out={settings.out!r}: expected another run folder")
    config, read = open_initial(path)
    if type(config) is not type(settings.model):
        kind = getattr(config, "transformer", {"model_type": "longnet"})["model_type"]
        raise ValueError(
            f"init_from={path!r} holds a model of kind {kind!r}, and the run trains a {type(settings.model).__name__}: "
            f"expected a {type(config).__name__} (longnet.training.read_transformer gives that of a transformer)"
        )
    weights = read()
    found = digest_tensors(weights)
    if digest not in (None, found):
        raise ValueError(f"init_from={path!r} holds weights of digest {found}: expected {digest}, those of the start")
    changes = check_fit(path, config, settings.model, weights)
    if not restored:
        say(f"Starting from the weights of {path}")
        if isinstance(config, TransformerConfig):
            say(f"Tokenizer: {tokenizer}")
        for change in changes:
            say(change)
        if warning := _short_pattern(settings):
            say(warning)
    return settings.replace(init_digest=found), weights


def _short_pattern(settings: TrainSettings) -> str | None:
    """A sentence where the context is longer than all segments, and no layer reads across them."""
    model = settings.model
    # Segments of the shifted type cross the borders of the others.
    types = set(model.layer_types or DILATED_TYPES[:1])
    if len(types) > 1 or not types <= set(DILATED_TYPES) or max(model.segment_lengths) >= settings.context:
        return None
    return (
        f"The longest segment has {max(model.segment_lengths):,} tokens, the context {settings.context:,}: what lies beyond "
        "all segments is never read. Longer segment_lengths in the file of --config change that"
    )


def copy_weights(weights: Mapping[str, Tensor], model: Model) -> None:
    """Copy the weights that :func:`read_initial` gave into the model, each in the model's dtype; no weights change nothing."""
    own = collect_weights(model)
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_fit(path: str, old: Config, new: Config, weights: Mapping[str, Tensor]) -> list[str]:
    """The fields that change from the ``old`` config, whose ``weights`` these are, to the ``new`` one, in words.

    Raises:
        ValueError: a change after which the weights do not fit, with the parameters that differ.
    """
    changes = changed_fields(_resolved(old), _resolved(new))
    expected = {name: tuple(x.shape) for name, x in collect_weights(make_model(new, device="meta")).items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    differ = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    wrong = [change for change in changes if change.split()[0] in _FIXED]
    if differ:
        more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        wrong.append(f"of its parameters {len(differ)} differ: {'; '.join(differ[:_SHOWN])}{more}")
    if wrong:
        raise ValueError(
            f"init_from={path!r} does not fit the model: {'; '.join(wrong)}. Expected the same parameters: the pattern, the "
            "types of layers, positions and dropout may change"
        )
    return changes


def _resolved(config: Config) -> Config:
    """With the numbers that a None stands for, as Hugging Face's configs have them."""
    if isinstance(config, TransformerConfig):
        return config
    return config.replace(ffn_dim=config.feed_forward_dim, kv_heads=config.kv_heads or config.heads)


def _hugging_face_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that ``save_pretrained`` wrote, in one file or in several."""
    index = folder / "model.safetensors.index.json"
    weights: dict[str, Tensor] = {}
    file = index
    try:
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        for name in names:
            file = folder / name
            weights |= load(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is not there: expected the safetensors that save_pretrained writes") from None
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from None
    plain = {name.removeprefix("model.").removeprefix("stack."): tensor for name, tensor in weights.items()}
    return {name.replace("lm_head.", "head."): tensor for name, tensor in plain.items()}


def _transformer_weights(folder: Path, config: TransformerConfig) -> dict[str, Tensor]:
    """The weights of a causal language model of transformers, by the names that they have in a run."""
    from longnet.hf.causal import read_weights

    try:
        weights = read_weights(folder, config.transformer)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return {f"model.{name}": tensor for name, tensor in weights.items()}
