"""Random streams: a pattern, tensors, left padding, and how they are cut into chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import branches
from torch import Tensor

from longnet import DilatedCache, stream_attention
from longnet.attention.streaming.step import step

Read = Callable[..., Tensor]


@dataclass(frozen=True)
class Stream:
    """Inputs of one stream; everything follows from small integers, so hypothesis can shrink and print it.

    ``cuts`` are where chunks end, taken modulo the length; ``lead`` is each row's left padding, None for no mask.
    """

    branches: tuple[tuple[int, int], ...]
    length: int
    cuts: tuple[int, ...] = ()
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 4
    head_offsets: str = "interleaved"
    lead: tuple[int, ...] | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def pattern(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(w for w, _ in self.branches), tuple(r for _, r in self.branches)

    def tensors(self) -> list[Tensor]:
        """q, k, v; in (B, T, H, D) memory, as a model's projections give them, for odd seeds."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            x = torch.randn(self.batch, self.length, heads, self.head_dim, generator=generator, dtype=torch.float64)
            x = x.to(self.dtype).transpose(1, 2)
            return x if self.seed % 2 else x.contiguous()

        return [draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)]

    def mask(self) -> Tensor | None:
        if self.lead is None:
            return None
        lead = [self.lead[row % len(self.lead)] % (self.length + 1) for row in range(self.batch)]
        return torch.arange(self.length) < torch.tensor(lead)[:, None]

    def cache(self, device: str | None = None) -> DilatedCache:
        return DilatedCache(
            *self.pattern,
            batch_size=self.batch,
            heads=self.heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            head_offsets=self.head_offsets,
            dtype=self.dtype,
            device=device,
        )

    def ends(self) -> list[int]:
        return sorted({cut % self.length for cut in self.cuts} - {0} | {self.length})

    def expected(self) -> Tensor:
        """All rows, by the definition, in float64."""
        options = {"is_causal": True, "key_padding_mask": self.mask(), "head_offsets": self.head_offsets}
        return dense_attention(*(x.double() for x in self.tensors()), *self.pattern, **options)[0]


def read(
    stream: Stream,
    cache: DilatedCache,
    tensors: Sequence[Tensor] | None = None,
    first: int = 0,
    last: int | None = None,
    attend: Read = stream_attention,
) -> Tensor:
    """The stream's tokens ``[first, last)`` through the cache, cut at the stream's cuts."""
    tensors, mask, outs = stream.tensors() if tensors is None else tensors, stream.mask(), []
    last = stream.length if last is None else last
    for end in [*(cut for cut in stream.ends() if first < cut < last), last]:
        part = None if mask is None else mask[:, first:end].to(cache.device)
        outs.append(attend(*(x[:, :, first:end] for x in tensors), cache, key_padding_mask=part))
        first = end
    return torch.cat(outs, dim=2)


def by_step(query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, key_padding_mask: Tensor | None) -> Tensor:
    """``stream_attention`` for one token on the path that devices with launches take, for longer chunks as usual."""
    if query.shape[2] > 1:
        return stream_attention(query, key, value, cache, key_padding_mask=key_padding_mask)
    if key_padding_mask is not None:
        lead = cache.padding + key_padding_mask[:, 0]
        cache._set_padding(lead, int(lead.max()))
    out, _ = step(query, key, value, cache, query.shape[-1] ** -0.5)
    cache.moved(1, on_device=False)
    return out


def streams(longest: int = 60) -> st.SearchStrategy[Stream]:
    return st.builds(
        Stream,
        branches=branches(),
        length=st.integers(1, longest),
        cuts=st.lists(st.integers(1, longest), max_size=8).map(tuple),
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([1, 2, 5, 8]),
        head_offsets=st.sampled_from(["interleaved", "blocked"]),
        lead=st.none() | st.tuples(*[st.integers(0, longest)] * 3),
        seed=st.integers(0, 2**16),
    )
