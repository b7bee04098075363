"""Random streams beyond the paper: windows, strides, blocks, segments without end, offset grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import dense_attention
from streams import Stream
from torch import Tensor

from longnet import DilatedCache
from longnet.attention.streaming.band_fused import fused_band_step
from longnet.attention.streaming.band_step import band_step
from longnet.attention.streaming.step import step
from longnet.geometry import HEAD_OFFSETS


@dataclass(frozen=True)
class BandStream(Stream):
    """A :class:`Stream` with more arguments. A tuple of offsets has one for each batch row, in turn."""

    window: int | None = None
    dilated_queries: bool = True
    dilation_block: int = 1
    segment_offset: int | tuple[int, ...] = 0
    capacity: int | None = None

    @property
    def beyond(self) -> dict[str, Any]:
        names = ("window", "dilated_queries", "dilation_block", "head_offsets")
        return {name: getattr(self, name) for name in names}

    @property
    def offset(self) -> int | Tensor:
        own = self.segment_offset
        if isinstance(own, int):
            return own
        return torch.tensor([own[row % len(own)] for row in range(self.batch)])

    def cache(self, device: str | None = None, **changes: Any) -> DilatedCache:
        """Full of NaN: what was not written must not matter."""
        offset = self.offset if isinstance(self.offset, int) else self.offset.to(device)
        settings: dict[str, Any] = {
            "batch_size": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "dtype": self.dtype, "device": device, "segment_offset": offset, "capacity": self.capacity,
        }  # fmt: skip
        cache = DilatedCache(*self.pattern, **(settings | self.beyond | changes))
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        return cache

    def expected_with_lse(self, tensors: list[Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        double = [x.double() for x in (self.tensors() if tensors is None else tensors)]
        options = {"is_causal": True, "key_padding_mask": self.mask(), "segment_offset": self.offset} | options
        return dense_attention(*double, *self.pattern, **options, **self.beyond)

    def expected(self) -> Tensor:
        return self.expected_with_lse()[0]


@st.composite
def band_streams(draw: st.DrawFn, longest: int = 60) -> BandStream:
    found = draw(st.lists(st.tuples(st.none() | st.integers(1, 40), st.integers(1, 7)), max_size=3))
    windows = st.integers(1, 30)
    offsets = st.integers(-99, 99)
    length = draw(st.integers(1, longest))
    return BandStream(
        branches=tuple((w, r if w is None else min(w, r)) for w, r in found),
        length=length,
        cuts=tuple(draw(st.lists(st.integers(1, longest), max_size=8))),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 5, 8])),
        head_offsets=draw(st.sampled_from(HEAD_OFFSETS)),
        lead=draw(st.none() | st.tuples(*[st.integers(0, longest)] * 3)),
        seed=draw(st.integers(0, 2**16)),
        window=draw(st.none() | windows if found else windows),
        dilated_queries=draw(st.booleans()),
        dilation_block=draw(st.sampled_from([1, 1, 2, 3, 8])),
        segment_offset=draw(st.just(0) | offsets | st.tuples(offsets, offsets, offsets)),
        capacity=draw(st.sampled_from([None, length, length + 9])),
    )


def _by(band_step: Any) -> Any:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, cache: DilatedCache, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """One token after the other."""
        outs = []
        for i in range(query.shape[2]):
            if key_padding_mask is not None:
                lead = cache.padding + key_padding_mask[:, i]
                cache._set_padding(lead, int(lead.max()))
            cache._make_room(1)
            token = [x[:, :, i : i + 1] for x in (query, key, value)]
            out, _ = (step if cache._is_paper else band_step)(*token, cache, query.shape[-1] ** -0.5)
            cache.moved(1, on_device=False)
            assert cache.position == int(cache.position_tensor)
            outs.append(out)
        return torch.cat(outs, 2)

    return attend


by_band_step, by_fused_band_step = _by(band_step), _by(fused_band_step)
