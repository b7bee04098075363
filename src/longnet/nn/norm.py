"""The norms a block can use, behind one call: ``norm(x, key_padding_mask)`` with x (B, N, C).

Layer norm (arXiv 1607.06450) and RMS norm (arXiv 1910.07467) look at one token at a time, so padding cannot reach
another token, and they ignore the mask. Batch norm (arXiv 1502.03167) looks at all tokens of the batch and
needs it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["layer", "rms", "batch"]
NORM_KINDS: tuple[str, ...] = get_args(NormKind)


def make_norm(
    kind: str,
    dim: int,
    eps: float = 1e-5,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build a norm over ``dim`` channels.

    The module's forward is ``norm(x, key_padding_mask=None) -> Tensor``: x (B, N, dim) of any float dtype,
    key_padding_mask (B, N) bool with True where the token is padding. The result has x's shape and dtype; statistics
    are computed in float32 (float64 for float64), under autocast too.

    Args:
        kind: ``"layer"``, ``"rms"`` (both per token, mask ignored) or ``"batch"`` (per channel over the unpadded
            tokens of the batch, running statistics in eval).
        dim: number of channels C.
        eps: added to the variance (to the mean square for ``"rms"``).

    Raises:
        ValueError: an unknown kind, or a dim below 1.
    """
    if kind not in NORM_KINDS:
        raise ValueError(f"kind={kind!r} is not a norm: expected one of {NORM_KINDS}")
    if dim < 1:
        raise ValueError(f"dim={dim} channels cannot be normalised: expected at least 1")
    if kind == "layer":
        return LayerNorm(dim, eps=eps, device=device, dtype=dtype)
    if kind == "rms":
        return RMSNorm(dim, eps=eps, device=device, dtype=dtype)
    return BatchNorm(dim, eps=eps, device=device, dtype=dtype)


def make_sub_norm(kind: str | None, dim: int, width: int, **made: Any) -> nn.Module | None:
    """MAGNETO's norm before an output projection, None for no ``kind``; of ``width`` channels the first ``dim`` are there."""
    if kind is None:
        return None
    return PartialNorm(kind, dim, width, **made) if dim < width else make_norm(kind, width, **made)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over C that takes the mask and ignores it: every token is normalised by itself."""

    def forward(self, input: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        # Autocast hands bfloat16 activations to float32 parameters: promote rather than round the parameters.
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over C that takes the mask and ignores it: every token is normalised by itself."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class PartialNorm(nn.Module):
    """A layer or rms norm of ``width`` channels of which the first ``dim`` are there, and all others are zero.

    So a norm over all heads says of those that are left what it said when the others' outputs were zero.

    Args:
        kind: ``"layer"`` or ``"rms"``.
        dim: channels that are there.
        width: channels that statistics are taken over.
        eps: added to the variance (to the mean square for ``"rms"``).

    Raises:
        ValueError: another kind, or not ``1 <= dim < width``.
    """

    def __init__(
        self,
        kind: str,
        dim: int,
        width: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("layer", "rms"):
            raise ValueError(f"kind={kind!r} cannot leave channels out: expected 'layer' or 'rms'")
        if not 1 <= dim < width:
            raise ValueError(f"dim={dim} of width={width} channels: expected at least 1 and fewer than all")
        self.kind, self.dim, self.width, self.eps = kind, dim, width, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if kind == "layer" else None

    def reset_parameters(self) -> None:
        """Weight to one, bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.dim}, width={self.width}, eps={self.eps}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise x (B, N, dim): the result, and what a channel that is zero becomes before weight and bias, (B, N, 1)."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        padded = F.pad(x.to(dtype), (0, self.width - self.dim))
        if self.bias is None:
            y = F.rms_norm(padded, (self.width,), eps=self.eps)
        else:
            y = F.layer_norm(padded, (self.width,), eps=self.eps)
        there, absent = y[..., : self.dim] * self.weight.to(dtype), y[..., -1:]
        if self.bias is not None:
            there = there + self.bias.to(dtype)
        return there.to(x.dtype), absent.to(x.dtype)


class BatchNorm(nn.Module):
    """Normalise every channel over all unpadded tokens of the batch; by running statistics in eval mode.

    Padded tokens take no part: whatever they hold (NaN too), statistics, the other tokens' results and all gradients
    are the same, and they come out as zeros. Training moves the running statistics by ``momentum`` towards the batch's
    mean and unbiased variance, as ``nn.BatchNorm1d`` does; a batch without a single unpadded token leaves them alone.
    Each process sees its own tokens only: nothing is exchanged between ranks.

    The running statistics are created in float32 at least, since steps of a tenth are lost in bfloat16;
    ``module.to(torch.bfloat16)`` converts them like everything else, as it does for torch's own batch norm.

    Raises (forward, in training mode): ValueError when the whole batch is a single token, whose variance is zero.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.momentum = dim, eps, momentum
        # Off while a checkpointed block is recomputed, or its statistics would move twice for one batch.
        self.update_statistics = True
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        at_least_float32 = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("running_mean", torch.empty(dim, device=device, dtype=at_least_float32))
        self.register_buffer("running_var", torch.empty(dim, device=device, dtype=at_least_float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and running variance to one, bias and running mean to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        padded = None if key_padding_mask is None else key_padding_mask.unsqueeze(-1)  # (B, N, 1)
        if padded is not None:
            y = y.masked_fill(padded, 0.0)
        if self.training:
            mean, var = self._batch_statistics(y, padded)
        else:
            mean, var = self.running_mean.to(y.dtype), self.running_var.to(y.dtype)
        scale = self.weight.to(y.dtype) * torch.rsqrt(var + self.eps)
        y = (y - mean) * scale + self.bias.to(y.dtype)
        if padded is not None:
            y = y.masked_fill(padded, 0.0)
        return y.to(x.dtype)

    def _batch_statistics(self, y: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) over unpadded tokens; y (B, N, C) holds zeros where padded (B, N, 1)."""
        tokens = y.shape[0] * y.shape[1]
        if tokens == 1:
            raise ValueError(
                f"x of shape {tuple(y.shape)} is a single token: batch norm in training mode needs more than one "
                "token to take a variance over; call .eval() or use norm='layer' or 'rms'"
            )
        if padded is None:
            count = torch.full((), float(tokens), device=y.device, dtype=y.dtype)
        else:
            count = (~padded).sum().to(y.dtype)
        divisor = count.clamp(min=1.0)
        mean = y.sum(dim=(0, 1)) / divisor
        centred = y - mean
        if padded is not None:
            centred = centred.masked_fill(padded, 0.0)
        var = centred.square().sum(dim=(0, 1)) / divisor
        if self.update_statistics:
            with torch.no_grad():
                # No unpadded token: step 0. A tensor, not a branch, so that no device waits and compile sees one graph.
                step = self.momentum * (count > 0).to(self.running_mean.dtype)
                unbiased = var * (count / (count - 1.0).clamp(min=1.0))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), step.to(self.running_var.dtype))
        return mean, var
