"""The model that all patterns share: a pre-norm transformer over bytes with rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning.attention import Sinks, attend, make_mask
from benchmarks.learning.patterns import Layer

_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """Sizes, and what may be added to any pattern.

    Args:
        shift_keys: in layers that reach far, half the channels of a key come from the token before (partial key offset).
        far_positions: whether layers that reach far rotate queries and keys.
        sinks: learned keys that every query reads.
    """

    layers: int = 8
    dim: int = 512
    heads: int = 8
    context: int = 8192
    shift_keys: bool = False
    far_positions: bool = True
    sinks: int = 0


class Model(nn.Module):
    """(B, N) bytes to (B, N, 256) logits in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(256, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, 256, bias=False)
        angle = torch.arange(shape.context)[:, None] * _BASE ** -(torch.arange(0, 1, 2 * shape.heads / shape.dim))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if name.endswith("out.weight") else 0.02)

    def read_as(self, layers: tuple[Layer, ...], device: torch.device) -> None:
        """Let each block read what its layer says; equal layers share the mask that FlexAttention needs."""
        shape, made = self.shape, {}
        for block, layer in zip(self.blocks, layers, strict=True):
            assert isinstance(block, Block)
            if layer not in made:
                made[layer] = make_mask(layer, shape.heads, shape.context, device, shape.sinks > 0)
            block.layer, block.mask = layer, made[layer]
            block.shift_keys = shape.shift_keys and layer.reaches_far and not layer.keeps_keys
            block.rotates = shape.far_positions or not layer.reaches_far or layer.keeps_keys

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x)).float()

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean nats of (B, N + 1) bytes."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Block(nn.Module):
    # Set by Model.read_as.
    layer: Layer
    mask: Any
    shift_keys: bool
    rotates: bool

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm, self.feed_norm = nn.RMSNorm(shape.dim), nn.RMSNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.attention_out = nn.Linear(shape.dim, shape.dim, bias=False)
        self.feed_in = nn.Linear(shape.dim, 4 * shape.dim, bias=False)
        self.feed_out = nn.Linear(4 * shape.dim, shape.dim, bias=False)
        width = shape.dim // shape.heads
        # With gains: scores of unit rows end at 8, too flat a softmax to single out one of 8,192 keys.
        self.query_norm, self.key_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.sinks = nn.Parameter(torch.randn(2, shape.heads, shape.sinks, width) * 0.02) if shape.sinks else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        query, key = self.query_norm(query), self.key_norm(key)
        if self.shift_keys:
            half = key.shape[-1] // 2
            key = torch.cat((key[..., :half], F.pad(key[..., half:], (0, 0, 1, -1))), dim=-1)
        if self.rotates:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        sinks = None if self.sinks is None else Sinks(self.sinks[0], self.sinks[1])
        query, key = query.to(value.dtype), key.to(value.dtype)
        attended = attend(self.layer, query, key, value.contiguous(), self.mask, sinks)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the first half of the channels with the second."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
