"""Sampling from a language model: temperature, top-k, nucleus (top-p, arXiv 1904.09751) and a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from longnet.models.longnet import LongNetLM


# Tokens of a prompt that are read at a time.
_CHUNK = 8192


@torch.no_grad()
def generate(
    model: LongNetLM,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue each prompt by ``max_new_tokens`` tokens.

    The prompt is read once, in chunks, into a cache of bounded size (:class:`longnet.models.cache.LongNetCache`); a new token
    then costs one step. A model with a relative position bias, which has no cached form yet, passes over the whole prefix for
    every token. Only the last position goes through the output head. The model is in eval mode meanwhile, and back in its
    previous mode afterwards.

    Args:
        model: a causal language model.
        tokens: (B, T) int64 prompts of one length, T >= 1.
        max_new_tokens: how many tokens to add, 0 or more.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; None or a k above the vocabulary keeps all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum, after ``top_k``.
        seed: of a generator on the model's device, so that the same seed gives the same tokens; None draws from
            torch's global generator.
        on_token: called after each token with the number of tokens added so far: 1, 2, ..., ``max_new_tokens``.

    Returns:
        (B, T + max_new_tokens) int64: the prompts and what follows.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """
    model.check_tokens(tokens)
    batch, prompt = tokens.shape
    if prompt == 0:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected at least one token to continue from")
    _check_integer("max_new_tokens", max_new_tokens, 0)
    check_sampling(temperature, top_k, top_p)
    generator = None
    if seed is not None:
        _check_integer("seed", seed, None)
        generator = torch.Generator(device=tokens.device).manual_seed(seed)
    result = torch.cat([tokens, tokens.new_zeros(batch, max_new_tokens)], dim=1)
    with _evaluating(model):
        cached = not model.config.use_rel_pos_bias and batch > 0
        cache = model.new_cache(batch, max_length=prompt + max_new_tokens) if cached else None
        for step in range(max_new_tokens):
            end = prompt + step
            if cache is None:
                hidden = model.hidden(result[:, :end])
            else:
                for start in range(cache.position, end, _CHUNK):
                    hidden = model.hidden(result[:, start : min(end, start + _CHUNK)], cache=cache)
            logits = model.logits(hidden[:, -1])  # (B, V)
            result[:, end] = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if on_token is not None:
                on_token(step + 1)
    return result


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row: logits (B, V) -> (B,) int64. Temperature 0 takes the first of the largest logits."""
    if temperature == 0 or logits.shape[0] == 0:
        return logits.argmax(dim=-1)
    probabilities = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def sampling_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that :func:`sample` draws from: logits (B, V) -> (B, V), float32 at least, rows sum to 1.

    First the temperature, then ``top_k``, then ``top_p`` of what is left; ties go to the lower token id. The likeliest
    token always stays.

    Raises:
        TypeError, ValueError: a temperature that is not above 0; ``top_k``, ``top_p`` of the wrong type or range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("temperature=0 gives no distribution: expected a temperature above 0, or the argmax")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    below_top = logits - logits.amax(dim=-1, keepdim=True)
    # A temperature that underflows makes 0 / 0 of the top: its quotient is 0 at any temperature.
    scaled = (below_top / temperature).masked_fill(below_top == 0, 0.0)
    if top_p == 1.0:
        top_p = None  # keeps all; the rounding of the sum could drop the tail
    if top_k is None and top_p is None:
        return scaled.softmax(dim=-1)
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = float("-inf")
    probabilities = ranked.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens; 0 for the first
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse sampling options of the wrong type or range."""
    _check_number("temperature", temperature)
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a finite number of at least 0 (0 is greedy)")
    if top_k is not None:
        _check_integer("top_k", top_k, 1)
    if top_p is not None:
        _check_number("top_p", top_p)
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p}: expected a probability in (0, 1]")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected a number")


def _check_integer(name: str, value: int, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} has type {type(value).__name__}: expected an int")
    if least is not None and value < least:
        raise ValueError(f"{name}={value}: expected at least {least}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in the mode it was in, also where they differed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
