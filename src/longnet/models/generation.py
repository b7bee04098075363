"""Sampling from a language model: temperature, top-k, nucleus (top-p, arXiv 1904.09751) and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longnet.checks import check_callable, check_int, check_settings
from longnet.models.base import LongNetBase
from longnet.models.cache import LongNetCache, uncached_reason
from longnet.models.captured import LEAST_TOKENS, CapturedStep, can_capture
from longnet.models.threads import step_threads


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The temperature is applied first, then ``top_k``, then ``top_p``; ties go to the lower token id.

    Attributes:
        temperature: divides the logits; 0 takes the first of the likeliest tokens.
        top_k: sample among the k likeliest tokens only; None or a k above the vocabulary takes all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected a finite number of at least 0 (0 is greedy)")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: expected a probability in (0, 1]")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token per row: logits (B, V) -> (B,) int64."""
        if self.temperature == 0 or logits.shape[0] == 0:
            return logits.argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that :meth:`draw` draws from: logits (B, V) -> (B, V), float32 at least, rows sum to 1.

        The likeliest token always stays.

        Raises:
            ValueError: a temperature of 0.
        """
        if self.temperature == 0:
            raise ValueError("temperature=0 gives no distribution: expected a temperature above 0, or the argmax")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        below_top = logits - logits.amax(dim=-1, keepdim=True)
        # A temperature that underflows makes 0 / 0 of the top: its quotient is 0 at any temperature.
        scaled = (below_top / self.temperature).masked_fill(below_top == 0, 0.0)
        # A top_p of 1 keeps all; the rounding of the sum could drop the tail.
        top_p = None if self.top_p == 1.0 else self.top_p
        if self.top_k is None and top_p is None:
            return scaled.softmax(dim=-1)
        ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = float("-inf")
        probabilities = ranked.softmax(dim=-1)
        if top_p is not None:
            before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens; 0 for the first
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


class LanguageModel(LongNetBase):
    """Generation, for a model that has these three methods."""

    hidden: Callable[..., Tensor]
    logits: Callable[[Tensor], Tensor]
    new_cache: Callable[..., LongNetCache]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        key_padding_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        eos: int | Sequence[int] | None = None,
        stop: Sequence[Sequence[int]] | None = None,
        pad: int | None = None,
        on_token: Callable[[int], None] | None = None,
        streamer: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue each prompt by up to ``max_new_tokens`` tokens.

        The prompt is read once, in chunks, into a :class:`longnet.models.cache.LongNetCache`; a new token then costs one step. A
        model that has no cached form yet (a relative position bias) passes over the whole prefix for every token.
        Only the last position goes through the output head. The model is in eval mode meanwhile, and back in its previous mode
        afterwards. On the CPU a small model's steps run on one thread (``longnet.models.threads.step_threads``). On a GPU steps
        are replayed from a CUDA graph, unless something of the model runs Python that a graph would leave out, as hooks do.

        Prompts of unequal length are read without their padding, rows of one length together: each row gets the distribution
        that it gets alone.

        Args:
            tokens: (B, T) int64 prompts, T >= 1.
            max_new_tokens: how many tokens to add at most, 0 or more.
            key_padding_mask: (B, T) bool, True where a prompt shorter than T is padded, right or left. None: no row is.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among the k likeliest tokens only; None or a k above the vocabulary keeps all.
            top_p: sample among the fewest likeliest tokens whose probabilities reach this sum, after ``top_k``.
            seed: of a generator on the prompts' device, so that the same seed gives the same tokens. With one int, rows whose
                prompts are equally long draw from one generator, one after the other, as if they were the whole batch. With B
                ints every row has its own: it draws what it draws alone with that seed. None draws from torch's global generator.
            eos: the token or tokens that end a row. Generation stops when all rows have ended.
            stop: sequences of tokens that end a row too, once its new tokens end with one: those of a stop string, say.
            pad: what follows in a row that has ended; default the first of ``eos``, 0 without.
            on_token: called after each step with the number of tokens added so far: 1, 2, ..., n.
            streamer: called after each step, before ``on_token``, with its new tokens (B,) int64.

        Returns:
            (B, T + n) int64: the prompts unchanged, and from column T on each row's n new tokens. n is ``max_new_tokens``, or
            less if all rows have ended: then the last column ends the longest. An ended row holds what ended it, then ``pad``.

        Raises:
            TypeError, ValueError: a value of the wrong type or range; a row that is all padding, or padding inside a prompt.
        """
        self.check_tokens(tokens)
        batch, width = tokens.shape
        if width == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected at least one token to continue from")
        check_int("max_new_tokens", max_new_tokens, 0)
        check_callable("on_token", on_token)
        check_callable("streamer", streamer)
        sampling = Sampling(temperature, top_k, top_p)
        ends, pad = _check_ends(eos, stop, pad, self.config.vocab_size)
        endings = [torch.tensor(end, device=tokens.device) for end in ends]
        _check_seeds(seed, batch)
        self.check_mask(key_padding_mask, batch, width)
        spans = [(0, width)] * batch if key_padding_mask is None else _spans(key_padding_mask)
        result = torch.cat([tokens, tokens.new_zeros(batch, max_new_tokens)], dim=1)
        with evaluating(self), ExitStack() as stack:
            groups = _grouped(self, tokens, spans, seed, max_new_tokens)
            for rows in groups:
                stack.callback(rows.forget_step)
            ended = tokens.new_zeros(batch, dtype=torch.bool)
            for step in range(max_new_tokens):
                if step == 1 and uncached_reason(self.config) is None:
                    # The prompts have been read; from here on each step is one token.
                    stack.enter_context(step_threads(self, batch))
                new = tokens.new_empty(batch)
                for rows in groups:
                    new[rows.batch_rows] = rows.next(self, step, sampling)
                if ends:
                    new = new.masked_fill(ended, pad)
                for rows in groups:
                    rows.tokens[:, rows.length + step] = new[rows.batch_rows]
                result[:, width + step] = new
                if streamer is not None:
                    streamer(new)
                if on_token is not None:
                    on_token(step + 1)
                for ending in endings:
                    if len(ending) <= step + 1:
                        ended |= (result[:, width + step + 1 - len(ending) : width + step + 1] == ending).all(1)
                if ends and bool(ended.all()):
                    return result[:, : width + step + 1]
        return result


# A prompt is read in chunks of ``_CHUNK`` tokens. Chunks on a GPU are longer, since each chunk costs launches: there the hidden
# layer of a feed-forward has up to ``_HIDDEN_NUMBERS`` numbers.
_CHUNK = 8192
_HIDDEN_NUMBERS = 1 << 27


def _chunk_of(model: LanguageModel, rows: Tensor) -> int:
    """Tokens of a chunk, for ``rows`` (b, N) that are read together."""
    if rows.device.type != "cuda":
        return _CHUNK
    tokens = _HIDDEN_NUMBERS // (len(rows) * model.config.feed_forward_dim)
    # A power of two: chunks then begin where segments do.
    return max(_CHUNK, 1 << max(0, tokens.bit_length() - 1))


@dataclass
class _Rows:
    """Rows whose prompts are equally long: they are read and continued together.

    ``batch_rows`` are their places in the batch, (b,) or a slice of all, ``tokens`` (b, length + max_new_tokens) the prompts and
    the new tokens. Without ``cache`` every token is a pass over the whole prefix.
    """

    batch_rows: Tensor | slice
    tokens: Tensor
    length: int
    cache: LongNetCache | None
    generators: list[torch.Generator | None]
    # Of a single token, where steps are captured.
    step: CapturedStep | None = None

    def next(self, model: LanguageModel, step: int, sampling: Sampling) -> Tensor:
        """The token (b,) that follows ``step`` new ones."""
        end = self.length + step
        if self.cache is None:
            return self._draw(model, model.hidden(self.tokens[:, :end]), sampling)
        if step == 0:
            chunk = _chunk_of(model, self.tokens)
            for start in range(0, end, chunk):
                hidden = model.hidden(self.tokens[:, start : min(end, start + chunk)], cache=self.cache)
            return self._draw(model, hidden, sampling)
        cache, tokens = self.cache, self.tokens[:, end - 1 : end]

        def read(tokens: Tensor) -> Tensor:
            return self._draw(model, model.hidden(tokens, cache=cache), sampling)

        if step == 1 and self.tokens.shape[1] - end >= LEAST_TOKENS and can_capture(model, tokens.device):
            self.step = CapturedStep(read, cache, tokens, self.generators)
        return (self.step or read)(tokens)

    def forget_step(self) -> None:
        """Give back the memory of the captured step at once: it refers to these rows as they refer to it."""
        self.step = None

    def _draw(self, model: LanguageModel, hidden: Tensor, sampling: Sampling) -> Tensor:
        """The token (b,) that follows what the hidden states (b, N, dim) are of."""
        # With a device_map the head may be elsewhere.
        logits = model.logits(hidden[:, -1]).to(self.tokens.device)  # (b, V)
        if len(self.generators) == 1:
            return sampling.draw(logits, self.generators[0])
        parts = zip(logits.split(1), self.generators, strict=True)
        return torch.cat([sampling.draw(row, generator) for row, generator in parts])


def _grouped(
    model: LanguageModel,
    tokens: Tensor,
    spans: Sequence[tuple[int, int]],
    seeds: int | Sequence[int] | None,
    max_new_tokens: int,
) -> list[_Rows]:
    """The batch by the length of its prompts; ``spans`` are (first token, end) of each."""
    numbers: dict[int, list[int]] = {}
    for row, (start, stop) in enumerate(spans):
        numbers.setdefault(stop - start, []).append(row)
    groups = []
    for length, rows in numbers.items():
        prompts = torch.stack([tokens[row, slice(*spans[row])] for row in rows])
        cache = None
        if uncached_reason(model.config) is None:
            # Of one size for all groups, so that they share compiled kernels.
            cache = model.new_cache(len(rows), max_length=max(numbers) + max_new_tokens)
        own_seeds = [seeds] if seeds is None or isinstance(seeds, int) else [seeds[row] for row in rows]
        generators = [
            None if seed is None else torch.Generator(device=tokens.device).manual_seed(seed) for seed in own_seeds
        ]
        output_buffer = torch.cat([prompts, prompts.new_zeros(len(rows), max_new_tokens)], 1)
        batch_rows = slice(None) if len(numbers) == 1 else torch.tensor(rows, device=tokens.device)
        groups.append(_Rows(batch_rows, output_buffer, length, cache, generators))
    return groups


def _spans(key_padding_mask: Tensor) -> list[tuple[int, int]]:
    """Where each row's prompt begins and ends."""
    spans = []
    for row, padded in enumerate(key_padding_mask.tolist()):
        if all(padded):
            raise ValueError(
                f"key_padding_mask[{row}] is True everywhere: expected at least one token to continue from"
            )
        start, stop = padded.index(False), len(padded) - padded[::-1].index(False)
        if any(padded[start:stop]):
            hole = padded.index(True, start)
            raise ValueError(
                f"key_padding_mask[{row}, {hole}] is True inside the prompt: expected padding before or after it"
            )
        spans.append((start, stop))
    return spans


def _check_ends(
    eos: int | Sequence[int] | None, stop: Sequence[Sequence[int]] | None, pad: int | None, vocab_size: int
) -> tuple[list[list[int]], int]:
    """The sequences of tokens that end a row, and what fills ended rows."""
    if eos is None and stop is None:
        if pad is not None:
            raise ValueError(f"pad={pad} given without eos or stop: expected what ends a row as well")
        return [], 0
    if eos is not None and (not isinstance(eos, (int, Sequence)) or isinstance(eos, str)):
        raise TypeError(f"eos={eos!r} has type {type(eos).__name__}: expected an int or a sequence of ints")
    single = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if eos is not None and not single:
        raise ValueError(f"eos={eos}: expected at least one token, or None")
    several = _check_stop(stop)
    pad = (single or [0])[0] if pad is None else pad
    of_stop = [("stop", token) for sequence in several for token in sequence]
    for name, token in [*(("eos", end) for end in single), *of_stop, ("pad", pad)]:
        check_int(name, token, 0)
        if token >= vocab_size:
            raise ValueError(f"{name}={token}: expected a token below vocab_size={vocab_size}")
    return [*([end] for end in single), *several], pad


def _check_stop(stop: object) -> list[list[int]]:
    if stop is None:
        return []
    # Bytes are a sequence of ints; a text is none, and neither is one sequence of tokens a sequence of such.
    if not isinstance(stop, Sequence) or isinstance(stop, (str, bytes)):
        raise TypeError(f"stop={stop!r} has type {type(stop).__name__}: expected a sequence of sequences of tokens")
    for sequence in stop:
        if not isinstance(sequence, Sequence) or isinstance(sequence, str):
            raise TypeError(f"stop holds {sequence!r} of type {type(sequence).__name__}: expected a sequence of tokens")
        if not sequence:
            raise ValueError(f"stop={stop}: expected at least one token in each sequence")
    if not stop:
        raise ValueError(f"stop={stop}: expected at least one sequence, or None")
    return [list(sequence) for sequence in stop]


def _check_seeds(seed: int | Sequence[int] | None, batch: int) -> None:
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != batch:
            raise ValueError(f"seed={seed} has {len(seed)} entries: expected one int, or one for each of {batch} rows")
        for one in seed:
            check_int("seed", one, None)
    elif seed is not None:
        check_int("seed", seed, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in the mode it was in, also where they differed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
