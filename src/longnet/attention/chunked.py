"""Attention in plain torch: a bounded number of scores at a time, computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet.attention import merge
from longnet.attention.key_ranges import KeyRanges

# Scores that exist at a time: enough to keep a device busy, 64 MiB in float32.
_SCORES = 1 << 24


@dataclass(frozen=True)
class Rows:
    """``G`` independent attentions of ``a`` queries to ``b`` keys each, in the dtype of the statistics.

    Args:
        query: (G, a, D).
        key, value: (G, b, D).
        scale: of the scores.
        is_causal: query ``i`` sees the keys up to ``i``; then a = b.
        padded: (G, b) bool, True where a key is to be ignored, or None.
        bias: (L, a + b - 1), L divides G, or None. In group g query ``i`` and key ``k`` have ``bias[g % L, k - i + a - 1]``
            added to their score.
        ranges: which keys each query sees, in place of ``is_causal``. The bias is then (L, 2M - 1), by the distance of their
            positions from its centre.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool = False
    padded: Tensor | None = None
    bias: Tensor | None = None
    ranges: KeyRanges | None = None

    def _chunks(self) -> Iterator[tuple[slice, slice, slice]]:
        """(groups, queries, keys) of every chunk. Keys past the last query of a causal chunk are left out."""
        groups, count, _ = self.query.shape
        keys = self.key.shape[1]
        if self.ranges is not None:
            yield from self._chunks_of_ranges(self.ranges)
            return
        step = max(1, _SCORES // max(1, count * keys))
        height = count if step > 1 else max(1, min(count, _SCORES // max(1, keys)))
        for first in range(0, groups, step):
            for low in range(0, count, height):
                high = min(count, low + height)
                yield (
                    slice(first, min(groups, first + step)),
                    slice(low, high),
                    slice(0, high if self.is_causal else keys),
                )

    def _chunks_of_ranges(self, ranges: KeyRanges) -> Iterator[tuple[slice, slice, slice]]:
        groups = self.query.shape[0]
        for low, high, start, stop in ranges.cut(_SCORES):
            step = max(1, _SCORES // max(1, (high - low) * (stop - start)))
            for first in range(0, groups, step):
                yield slice(first, min(groups, first + step)), slice(low, high), slice(start, stop)

    def _scores(self, groups: slice, queries: slice, keys: slice) -> Tensor:
        scores = (self.query[groups, queries] @ self.key[groups, keys].transpose(-1, -2)).mul_(self.scale)
        if self.ranges is not None:
            if self.bias is not None:
                scores += self.bias[self._bias_rows(groups)[:, None, None], self._columns(self.ranges, queries, keys)]
            low, high = (x[queries].to(scores.device)[:, None] for x in (self.ranges.low, self.ranges.high))
            place = torch.arange(keys.start, keys.stop, device=scores.device)
            scores.masked_fill_((place < low) | (place >= high), -torch.inf)
        elif self.bias is not None:
            # Row i of the windows is the bias at distances (0 - i) .. (keys - 1 - i).
            windows = self.bias[:, self._distances(queries, keys)].unfold(-1, keys.stop, 1).flip(1)
            scores += windows[self._bias_rows(groups)]
        if self.padded is not None:
            scores.masked_fill_(self.padded[groups, None, keys], -torch.inf)
        if self.is_causal:
            row = torch.arange(queries.start, queries.stop, device=scores.device)
            scores.masked_fill_(torch.arange(keys.stop, device=scores.device) > row[:, None], -torch.inf)
        return scores

    def _columns(self, ranges: KeyRanges, queries: slice, keys: slice) -> Tensor:
        """The bias's column of each query and key; any one where they do not meet."""
        assert self.bias is not None
        width = self.bias.shape[1]
        distance = ranges.keys[keys] - ranges.queries[queries, None] + width // 2
        return distance.clamp_(0, width - 1).to(self.query.device)

    def _distances(self, queries: slice, keys: slice) -> slice:
        """The bias's columns that a chunk meets."""
        count = self.query.shape[1]
        return slice(count - queries.stop, count - 1 - queries.start + keys.stop)

    def _bias_rows(self, groups: slice) -> Tensor:
        """The bias's row of each group."""
        assert self.bias is not None
        return torch.arange(groups.start, groups.stop, device=self.query.device) % self.bias.shape[0]

    def _visible(self) -> Tensor:
        """The values, 0 where the key is padding: a NaN there must not reach 0 * value."""
        return self.value if self.padded is None else self.value.masked_fill(self.padded.unsqueeze(-1), 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (G, a, D) and lse (G, a); 0 and -inf for a query without keys."""
        value = self._visible()
        out, lse = torch.empty_like(self.query), self.query.new_empty(self.query.shape[:-1])
        for groups, queries, keys in self._chunks():
            scores = self._scores(groups, queries, keys)
            chunk_lse = scores.logsumexp(-1)
            scores.sub_(merge.lse_for_backward(chunk_lse).unsqueeze(-1)).exp_()
            out[groups, queries] = scores @ value[groups, keys]
            lse[groups, queries] = chunk_lse
        return out, lse

    def backward(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of query, key, value and bias, by the rule of :mod:`longnet.attention.merge`.

        Args:
            grad_out: (G, a, D).
            lse: (G, a) of the joint softmax, as :func:`longnet.attention.merge.rows_for_backward` gives it.
            delta: (G, a), ``sum(grad_out * out)`` of the joint softmax less the gradient of its lse.
        """
        value = self._visible()
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (self.query, self.key, self.value))
        grad_bias = None if self.bias is None else torch.zeros_like(self.bias)
        for groups, queries, keys in self._chunks():
            p = self._scores(groups, queries, keys).sub_(lse[groups, queries, None]).exp_()
            grad_v[groups, keys] += p.transpose(-1, -2) @ grad_out[groups, queries]
            grad_s = grad_out[groups, queries] @ value[groups, keys].transpose(-1, -2)
            grad_s.sub_(delta[groups, queries, None]).mul_(p)
            grad_q[groups, queries] = grad_s @ self.key[groups, keys] * self.scale
            grad_k[groups, keys] += grad_s.transpose(-1, -2) @ self.query[groups, queries] * self.scale
            if grad_bias is not None:
                height, width = grad_s.shape[1:]
                by_row = grad_s.new_zeros(len(grad_bias), height, width).index_add_(0, self._bias_rows(groups), grad_s)
                if self.ranges is not None:
                    grad_bias.index_add_(1, self._columns(self.ranges, queries, keys).flatten(), by_row.flatten(1))
                    continue
                # Skewing rows by one each turns diagonals of equal distance into columns, which then add up without atomics.
                skewed = F.pad(by_row.flip(1), (0, height)).flatten(1)[:, :-height]
                by_distance = skewed.unflatten(1, (height, width + height - 1)).sum(1)
                grad_bias[:, self._distances(queries, keys)] += by_distance
        if self.padded is not None:
            grad_v.masked_fill_(self.padded.unsqueeze(-1), 0.0)
        return grad_q, grad_k, grad_v, grad_bias
