"""Documents packed into one row: each is attended to by itself, in few calls.

Documents of similar length become rows of one batch, so that thousands of short ones are a handful of calls. Where nothing has
to be moved for that (documents of one length, or each alone in its bucket) the calls read views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longnet.attention.backends import Backend
from longnet.attention.call import AttentionInputs
from longnet.checks import is_int
from longnet.runtime.cache import tensor_cache
from longnet.runtime.torch_internals import version_of
from longnet.runtime.tracing import untraced

# Rows of a bucket differ by at most a quarter of the longest, short ones by anything: a call costs more than they do.
_SHORT = 64
# From this length on a document keeps a call (or a row) of its own length: it fills the device without others.
_LONG = {"cpu": 1024}
_LONG_ELSEWHERE = 32768

# What boundary tensors held when they were last read: reading asks the device. Bounds follow a tensor's version.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Bucket:
    """Documents that are rows of one call, as (start, tokens), in order; ``longest`` is the most tokens of one."""

    documents: tuple[tuple[int, int], ...]
    longest: int

    @property
    def padded(self) -> bool:
        return any(tokens < self.longest for _, tokens in self.documents)


@untraced
def boundaries(cu_seqlens: Tensor | Sequence[int], length: int) -> tuple[int, ...]:
    """``cu_seqlens`` as ints, checked. A tensor on a device is read once, and again only after it was written to.

    Raises:
        TypeError: no int32 or int64 tensor and no ints. ValueError: not one dimension, not from 0 to ``length``, falling.
    """
    bounds = _ints(cu_seqlens)
    if not bounds or bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 8 else f"({', '.join(map(str, bounds[:4]))}, ..., {bounds[-1]})"
        raise ValueError(f"cu_seqlens={shown}: expected boundaries that start at 0, never fall and end at N = {length}")
    return bounds


def _ints(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(cu_seqlens, Tensor):
        if isinstance(cu_seqlens, str) or not isinstance(cu_seqlens, Sequence):
            raise TypeError(
                f"cu_seqlens has type {type(cu_seqlens).__name__}: expected an int32 or int64 tensor, or ints, or None"
            )
        for item in cu_seqlens:
            if not is_int(item):
                raise TypeError(f"cu_seqlens holds {item!r} of type {type(item).__name__}: expected ints")
        return tuple(cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}: expected torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (documents + 1,)")
    written = version_of(cu_seqlens)
    if cu_seqlens.device.type == "cpu" or written is None:
        return tuple(cu_seqlens.tolist())
    version, bounds = _read.get(cu_seqlens, (None, ()))
    if version != written:
        bounds = tuple(cu_seqlens.tolist())
        _read[cu_seqlens] = (written, bounds)
    return bounds


def positions(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """The place of every token in its own document, (N,) int64."""
    place = [torch.arange(stop - start) for start, stop in pairwise(bounds)]
    return torch.cat(place).to(device) if place else torch.empty(0, dtype=torch.int64, device=device)


def by_token(numbers: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """The number (documents,) of every token's own document, (N,)."""
    lengths = torch.tensor([stop - start for start, stop in pairwise(bounds)], device=numbers.device)
    return numbers.repeat_interleave(lengths, output_size=bounds[-1])


@lru_cache(maxsize=64)
def make_buckets(bounds: tuple[int, ...], long: int) -> tuple[Bucket, ...]:
    """The documents that have tokens, in buckets; those of ``long`` tokens and more only beside others of their length."""
    documents = [(start, stop - start) for start, stop in pairwise(bounds) if stop > start]
    alike: list[list[tuple[int, int]]] = []
    for document in sorted(documents, key=lambda document: -document[1]):
        longest = alike[-1][0][1] if alike else 0
        tokens = document[1]
        similar = longest < long and (longest <= _SHORT or 4 * tokens >= 3 * longest)
        if alike and (tokens == longest or similar):
            alike[-1].append(document)
        else:
            alike.append([document])
    buckets = [Bucket(tuple(sorted(bucket)), bucket[0][1]) for bucket in alike]
    return tuple(sorted(buckets, key=lambda bucket: bucket.documents))


@tensor_cache(4)
def _moves(buckets: tuple[Bucket, ...], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(the token of every place, the place of every token) when all buckets lie one after the other; None if as they are.

    The places behind a document's end repeat its first token.
    """
    tokens, place_of, places = [], {}, 0
    for bucket in buckets:
        for start, count in bucket.documents:
            tokens.append(
                torch.arange(start, start + bucket.longest).where(torch.arange(bucket.longest) < count, start)
            )
            place_of[start] = torch.arange(places, places + count)
            places += bucket.longest
    token, place = torch.cat(tokens), torch.cat([place_of[start] for start in sorted(place_of)])
    if torch.equal(token, torch.arange(len(place))):
        return None
    return token.to(device), place.to(device)


@untraced
def packed_attention(inputs: AttentionInputs, backend: Backend) -> tuple[Tensor, Tensor]:
    """(out, lse) of inputs with B = 1, each of the spec's documents by itself."""
    device, bounds = inputs.query.device, inputs.spec.documents
    assert bounds is not None
    buckets = make_buckets(bounds, _LONG.get(device.type, _LONG_ELSEWHERE))
    if not buckets:
        return inputs.query.clone(), inputs.empty_outputs()[1]
    alone = replace(inputs.spec, documents=None)
    # No tensor made in inference mode may end up in what later calls that train share.
    with torch.inference_mode(False):
        moves = _moves(buckets, device)
    # (N, heads, D): tokens are moved with all their heads.
    tensors = [x[0].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value)]
    masked = None if inputs.mask is None else inputs.mask[0]
    if moves is not None:
        tensors = [x.index_select(0, moves[0]) for x in tensors]
        masked = None if masked is None else masked.index_select(0, moves[0])
    outs, lses = [], []
    for bucket, *parts, mask in _parts(buckets, tensors, masked, alone.is_causal):
        q, k, v = (x.unflatten(0, (len(bucket.documents), bucket.longest)).transpose(1, 2) for x in parts)
        offsets = None if inputs.offsets is None else inputs.offsets.index_select(0, _numbers(bounds, bucket, device))
        out, lse = backend.run(AttentionInputs(q, k, v, mask, inputs.bias, alone, offsets))
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
    if moves is not None:
        out, lse = out.index_select(0, moves[1]), lse.index_select(0, moves[1])
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]


def _numbers(bounds: tuple[int, ...], bucket: Bucket, device: torch.device) -> Tensor:
    """Which documents a bucket holds, counted from the first, empty ones too."""
    number_of = {start: number for number, (start, stop) in enumerate(pairwise(bounds)) if stop > start}
    return torch.tensor([number_of[start] for start, _ in bucket.documents], device=device)


def _parts(
    buckets: tuple[Bucket, ...], tensors: list[Tensor], masked: Tensor | None, is_causal: bool
) -> Iterator[tuple[Bucket, Tensor, Tensor, Tensor, Tensor | None]]:
    """Every bucket with its tokens of q, k and v, (documents * longest, heads, D), and its mask, (documents, longest)."""
    sizes = [len(bucket.documents) * bucket.longest for bucket in buckets]
    # Split, not sliced: the backward pass of slices would fill a whole gradient for each of them.
    q, k, v = (x.split(sizes) for x in tensors)
    starts = accumulate(sizes, initial=0)
    for number, (bucket, start) in enumerate(zip(buckets, starts, strict=False)):
        shape = (len(bucket.documents), bucket.longest)
        mask = None if masked is None else masked[start : start + sizes[number]].view(shape)
        if bucket.padded and not is_causal:
            # A causal query never sees what lies behind it, and what lies behind the end is dropped.
            counts = torch.tensor([tokens for _, tokens in bucket.documents], device=tensors[0].device)
            behind = torch.arange(bucket.longest, device=counts.device) >= counts[:, None]
            mask = behind if mask is None else mask | behind
        yield bucket, q[number], k[number], v[number], mask
