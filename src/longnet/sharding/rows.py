"""Attention among gathered rows: what ordinary kernels cannot read in place, because its keys came from other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet import mixing

# Scores that exist at a time: 64 MiB in float32.
_SCORES = 1 << 24


@dataclass(frozen=True)
class RowCall:
    """``lanes`` independent attentions of ``a`` queries to ``b`` keys each, in the dtype of the statistics.

    Args:
        query: (B, lanes, a, D).
        key, value: (B, lanes, b, D).
        scale: of the scores.
        is_causal: query ``i`` sees the keys up to ``i``; then a = b.
        padded: (B, lanes, b) bool, True where a key is to be ignored, or None.
        bias: (lanes, a + b - 1) or None; query ``i`` and key ``k`` have ``bias[k - i + a - 1]`` added to their score.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool
    padded: Tensor | None
    bias: Tensor | None

    def _scores(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(queries, keys, their scores), some of them -inf, a bounded number at a time."""
        batch, lanes, rows, _ = self.query.shape
        keys = self.key.shape[2]
        step = max(1, _SCORES // max(1, batch * lanes * keys))
        for low in range(0, rows, step):
            high = min(rows, low + step)
            seen = high if self.is_causal else keys
            scores = (self.query[:, :, low:high] * self.scale) @ self.key[:, :, :seen].transpose(-1, -2)
            if self.bias is not None:
                # Row i of the windows is the bias at distances (0 - i) .. (seen - 1 - i).
                windows = self.bias[:, rows - high : rows - 1 - low + seen].unfold(-1, seen, 1)
                scores += windows.flip(1)
            if self.padded is not None:
                scores.masked_fill_(self.padded[:, :, None, :seen], -torch.inf)
            if self.is_causal:
                row = torch.arange(low, high, device=scores.device)
                scores.masked_fill_(torch.arange(seen, device=scores.device) > row[:, None], -torch.inf)
            yield slice(low, high), slice(0, seen), scores

    def _values(self) -> Tensor:
        # Whatever a padded value holds (a NaN, say) must not reach 0 * value.
        return self.value if self.padded is None else self.value.masked_fill(self.padded.unsqueeze(-1), 0.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, lanes, a, D) and lse (B, lanes, a); 0 and -inf for a query without keys."""
        value = self._values()
        out, lse = torch.empty_like(self.query), self.query.new_empty(self.query.shape[:-1])
        for queries, keys, scores in self._scores():
            lse[:, :, queries] = scores.logsumexp(-1)
            shift = mixing.lse_for_backward(lse[:, :, queries])
            out[:, :, queries] = scores.sub_(shift.unsqueeze(-1)).exp_() @ value[:, :, keys]
        return out, lse

    def backward(self, grad_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of query, key, value and bias, by the rule of :mod:`longnet.mixing`.

        Args:
            grad_out: (B, lanes, a, D).
            lse: (B, lanes, a) of the joint softmax, as :func:`longnet.mixing.rows_for_backward` gives it.
            delta: (B, lanes, a), ``sum(grad_out * out)`` of the joint softmax less the gradient of its lse.
        """
        value = self._values()
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (self.query, self.key, self.value))
        grad_bias = None if self.bias is None else torch.zeros_like(self.bias)
        rows = self.query.shape[2]
        for queries, keys, scores in self._scores():
            p = scores.sub_(lse[:, :, queries].unsqueeze(-1)).exp_()
            grad_v[:, :, keys] += p.transpose(-1, -2) @ grad_out[:, :, queries]
            grad_s = grad_out[:, :, queries] @ value[:, :, keys].transpose(-1, -2)
            grad_s.sub_(delta[:, :, queries].unsqueeze(-1)).mul_(p)
            grad_q[:, :, queries] = grad_s @ self.key[:, :, keys] * self.scale
            grad_k[:, :, keys] += grad_s.transpose(-1, -2) @ self.query[:, :, queries] * self.scale
            if grad_bias is not None:
                height, width = grad_s.shape[2:]
                # Skewing rows by one each turns diagonals of equal distance into columns.
                skewed = F.pad(grad_s.sum(0).flip(1), (0, height)).flatten(1)[:, :-height]
                by_distance = skewed.unflatten(1, (height, width + height - 1)).sum(1)
                grad_bias[:, rows - queries.stop : rows - 1 - queries.start + width] += by_distance
        if self.padded is not None:
            grad_v.masked_fill_(self.padded.unsqueeze(-1), 0.0)
        return grad_q, grad_k, grad_v, grad_bias
