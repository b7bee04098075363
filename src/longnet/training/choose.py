"""Which full layers of a trained model stay full when the others get sliding windows, by the loss on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch

from longnet.checks import check_ints
from longnet.geometry import score_pairs
from longnet.models import LongNetLM
from longnet.models.layer_types import DILATED_TYPES
from longnet.models.placement import device_of
from longnet.models.window_layers import full_layers, window_layers
from longnet.training.data import Stream, draw_starts
from longnet.training.evaluate import score_windows
from longnet.training.models import Config, Model, fit_context, layer_types_of, make_model
from longnet.training.transformer import TransformerLM
from longnet.training.transformer_config import TransformerConfig

DEFAULT_WINDOW = 512
# Layers that read the window of the config.
_WITH_WINDOW = frozenset(("sliding_attention", "strided_attention"))


@dataclass(frozen=True)
class Candidate:
    """A trained model after some of its full layers got windows.

    Attributes:
        layer: the layer that got its window last, from 0; None for the model as it was trained.
        layer_types: of all layers.
        loss: mean cross-entropy in nats a token.
        pair_share: query-key pairs of all layers, as a share of those of dense attention at the context.
    """

    layer: int | None
    layer_types: tuple[str, ...]
    loss: float
    pair_share: float

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that are full, from 0."""
        return full_layers(self.layer_types)


def windowed_config(config: Config, context: int, window: int | None = None, full: int = 1) -> Config:
    """The config of a trained model with the type of every layer and the window that its full layers are to get.

    Args:
        config: of a decoder with full layers: a LongNet, or a transformer.
        context: tokens of a window of text, N. A transformer gets positions for as many.
        window: tokens that a layer with a window reads; None for the window of the model's own sliding and strided layers,
            512 where it has none.
        full: how many layers stay full, at least 1.

    Raises:
        TypeError: a number that is no int.
        ValueError: a number out of range, a model without as many full layers, a window other than that of its own layers, or
            a model whose layers cannot get windows.
    """
    check_ints(1, context=context, full=full)
    types = layer_types_of(config)
    if not full_layers(types):
        pattern = "LongNet's dilated attention" if set(types) <= set(DILATED_TYPES) else ", ".join(dict.fromkeys(types))
        raise ValueError(
            f"the layers of the model are all of {pattern}: expected a model with full attention layers, trained dense say, as "
            "only these get windows"
        )
    if (count := len(full_layers(types))) <= full:
        at_most = f"from 1 to {count - 1}" if count > 1 else "a model with at least 2"
        layers = f"{count} full layer{'s' * (count != 1)}"
        raise ValueError(f"full={full} with {layers} in the model: expected {at_most}")
    own = None
    if _WITH_WINDOW & set(types):
        own = config.sliding_window
        if own is None and isinstance(config, TransformerConfig):
            own = getattr(config.hugging_face, "sliding_window", None)
    default = "" if window is not None else " (the default)"
    if window is None:
        window = own or DEFAULT_WINDOW
    check_ints(1, window=window)
    if own is not None and window != own:
        raise ValueError(
            f"window={window} for a model whose sliding or strided layers read {own} tokens: expected window={own}, as one "
            "number holds for all layers"
        )
    if window >= context:
        raise ValueError(f"window={window}{default} with context={context}: expected a window shorter than the context")
    changed = config.replace(layer_types=types, sliding_window=window)
    last = full_layers(types)[-1]
    fewest = ("sliding_attention" if one == "full_attention" and at != last else one for at, one in enumerate(types))
    windows = changed.replace(layer_types=tuple(fewest))
    if isinstance(changed, TransformerConfig) and isinstance(windows, TransformerConfig):
        fit_context(windows, context)
        return fit_context(changed, context)
    make_model(windows, device="meta")
    return changed


def choose_layers(
    model: Model,
    stream: Stream,
    context: int,
    *,
    window: int | None = None,
    full: int = 1,
    texts: int = 16,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float, int], None] | None = None,
) -> Iterator[Candidate]:
    """Give full layers of a trained model windows, one after another: each time the layer whose window raises the loss least.

    A model of L full layers takes about L^2 / 2 losses. Between two results the model is as it was. The text is always the same:
    the windows of the first step of a run with seed 0 and ``texts`` windows a step, so the loss is that of its first step.

    Args:
        model: a LongNetLM, or a TransformerLM, on its device.
        stream: training tokens (tokens,), ``Corpus.train`` or a numpy array of integers. What is chosen on is no longer held out.
        context: tokens of a window of text, N.
        window: tokens that a layer with a window reads, below ``context``; None as in :func:`windowed_config`.
        full: how many layers stay full, at least 1.
        texts: how many windows of text.
        batch: of these, how many a forward pass reads.
        dtype: of the forward pass (autocast below float32).
        on_progress: called with how many losses are computed, parts of one counted, and how many there are in all.

    Yields:
        the model itself, then a candidate for each layer that gets a window, the cheapest first.

    Raises:
        TypeError: as :func:`windowed_config`, or a stream of another kind.
        ValueError: as :func:`windowed_config`, numbers below 1, too little text, or a loss that is not finite.
    """
    if not isinstance(stream, Stream):
        raise TypeError(
            f"stream has type {type(stream).__name__}: expected Corpus.train, or a numpy array of token numbers"
        )
    check_ints(1, texts=texts, batch=batch)
    config = windowed_config(model.config, context, window, full)
    types, starts = layer_types_of(config), draw_starts(stream, context, texts, 0, 1)
    total, done = 1 + sum(range(full + 1, len(full_layers(types)) + 1)), 0

    def advance(share: float) -> None:
        if on_progress is not None:
            on_progress(done + share, total)

    def loss(layer_types: tuple[str, ...]) -> float:
        nonlocal done
        with _attending_as(model, config.replace(layer_types=layer_types)) as changed:
            device = device_of(model.embedding)
            bits = score_windows(
                changed, stream, context, starts, batch=batch, device=device, dtype=dtype, on_progress=advance
            )
        done += 1
        return float(bits.mean(dtype="float64")) * math.log(2)

    dense = loss(types)
    if not math.isfinite(dense):
        raise ValueError(f"the loss of the model itself is {dense}: expected a finite number")
    yield Candidate(None, types, dense, pair_share(config, context))
    for step in window_layers(types, loss, full):
        share = pair_share(config.replace(layer_types=step.layer_types), context)
        yield Candidate(step.layer, step.layer_types, step.loss, share)


@contextmanager
def _attending_as(model: Model, config: Config) -> Iterator[Model]:
    """A model of these weights with the layers of another config: a copy of a LongNet, a transformer itself for a while."""
    if isinstance(model, TransformerLM) and isinstance(config, TransformerConfig):
        before = model.config
        model.attend_as(config)
        try:
            yield model
        finally:
            model.attend_as(before)
    else:
        assert isinstance(model, LongNetLM) and config.layer_types is not None and config.sliding_window is not None
        yield model.with_layer_types(config.layer_types, sliding_window=config.sliding_window)


def pair_share(config: Config, context: int) -> float:
    """Query-key pairs of all layers at a context of N tokens, as a share of those of dense attention."""
    layers = config.layer_attentions()
    pairs = sum(score_pairs(one.pattern, one.heads, context, True, segment_offset=one.segment_offset) for one in layers)
    return float(Fraction(pairs, sum(one.heads for one in layers) * context * (context + 1) // 2))
