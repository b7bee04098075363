"""Streams of some heads by number: what they read among all heads, and caches that know their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import KeptHeads, Problem, kept_heads, relative_error
from streams import by_step

from longnet import DilatedCache, stream_attention

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")


@given(kept=kept_heads(), cuts=st.sets(st.integers(1, 44), max_size=5), single=st.booleans())
@settings(max_examples=120, deadline=None)
def test_streamed_in_any_chunks(kept: KeptHeads, cuts: set[int], single: bool) -> None:
    one = kept.problem
    one = Problem(**{**vars(one), "is_causal": True, "padding": None})
    kept = KeptHeads(one, kept.kv_heads)
    cache = DilatedCache(
        one.segment_lengths, one.dilation_rates, batch_size=one.batch, heads=one.heads, kv_heads=one.kv_heads,
        head_dim=one.head_dim, head_offsets=one.head_offsets, head_numbers=kept.numbers, dtype=torch.float64,
    )  # fmt: skip
    assert (cache.heads, cache.kv_heads) == (len(kept.numbers), len(kept.kv_heads))
    attend = by_step if single else stream_attention
    outs, first = [], 0
    if single:
        cuts = set(range(min(cuts, default=1), one.length))
    for end in sorted({cut for cut in cuts if cut < one.length} | {one.length}):
        part = (x.detach()[:, :, first:end] for x in kept.tensors())
        outs.append(attend(*part, cache, key_padding_mask=None))
        first = end
    assert relative_error(torch.cat(outs, 2), kept.expected()[0]) < 1e-10


def test_a_cache_goes_on_with_its_own_heads_only() -> None:
    def cache(numbers: tuple[int, ...] | None, heads: int = 4) -> DilatedCache:
        return DilatedCache((8, 16), (1, 2), batch_size=1, heads=heads, head_dim=4, head_numbers=numbers)

    torch.manual_seed(0)
    first = cache((0, 3))
    chunk = [torch.randn(1, 2, 13, 4) for _ in range(3)]
    stream_attention(*chunk, first)
    again = cache((0, 3))
    again.load_state_dict(first.state_dict())
    token = [torch.randn(1, 2, 1, 4) for _ in range(3)]
    assert torch.equal(stream_attention(*token, again), stream_attention(*token, first))
    for other in (cache((0, 2)), cache(None, 2)):
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"head_numbers=\(0, 9\): expected at least one of the heads 0 to 3"):
        cache((0, 9))
    with pytest.raises(ValueError, match=r"expected all 2 heads of a key/value head, or none"):
        DilatedCache(8, 1, batch_size=1, heads=4, kv_heads=2, head_dim=4, head_numbers=(0, 1, 2))
