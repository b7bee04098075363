"""torchscale's LongNet and GigaPath's slide encoder, straightforward: dense attention, padding of real zeros, no code of ours.

Written from what their sources do, for float64. Weights come as their state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], rates: tuple[int, ...], is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) to out (B, H, N, D) and lse (B, H, N), -inf where no branch selects the row."""
    batch, heads, tokens, dim = query.shape
    outs, lses = [], []
    for length, rate in zip(lengths, rates, strict=True):
        width = min(length, tokens)
        segments = math.ceil(tokens / width)
        slots = math.ceil(width / rate)

        def pad(
            x: Tensor, width: int = width, segments: int = segments, slots: int = slots, rate: int = rate
        ) -> Tensor:
            x = F.pad(x, (0, 0, 0, segments * width - tokens)).view(batch, heads, segments, width, dim)
            return F.pad(x, (0, 0, 0, slots * rate - width))

        q, k, v = pad(query), pad(key), pad(value)
        out = torch.zeros_like(q)
        lse = torch.full_like(q[..., 0], -1e8)
        for head in range(heads):
            offset = head // math.ceil(heads / rate)
            rows = slice(offset, None, rate)
            scores = q[:, head, :, rows] @ k[:, head, :, rows].transpose(-1, -2) * dim**-0.5
            if is_causal:
                scores = scores.masked_fill(torch.ones(slots, slots).triu(1).bool(), -math.inf)
            out[:, head, :, rows] = scores.softmax(-1) @ v[:, head, :, rows]
            lse[:, head, :, rows] = scores.logsumexp(-1)
        outs.append(out.flatten(2, 3)[:, :, :tokens])
        lses.append(lse.flatten(2, 3)[:, :, :tokens])
    stacked = torch.stack(lses)
    mixed = (torch.stack(outs) * stacked.softmax(0).unsqueeze(-1)).sum(0)
    return mixed, stacked.logsumexp(0).masked_fill(stacked.amax(0) < -1e7, -math.inf)


def xpos(x: Tensor, base: float, inverse: bool) -> Tensor:
    tokens, dim = x.shape[-2:]
    pair = torch.arange(0, dim, 2, dtype=x.dtype)
    scale = ((pair + 0.4 * dim) / (1.4 * dim)) ** ((torch.arange(tokens, dtype=x.dtype) - tokens // 2) / base)[:, None]
    scale = 1 / scale if inverse else scale
    angle = torch.arange(tokens, dtype=x.dtype)[:, None] / 10000 ** (pair / dim)
    sin, cos = (angle.sin() * scale).repeat_interleave(2, 1), (angle.cos() * scale).repeat_interleave(2, 1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def layers(
    weights: Weights,
    x: Tensor,
    heads: int,
    lengths: tuple[int, ...],
    rates: tuple[int, ...],
    prefix: str = "",
    is_causal: bool = False,
    xpos_base: float | None = None,
) -> list[Tensor]:
    """x (B, N, C) and the states after every layer."""
    states = [x]
    depth = 1 + max(int(name[len(prefix) :].split(".")[1]) for name in weights if name.startswith(f"{prefix}layers."))
    for number in range(depth):

        def linear(y: Tensor, name: str, at: str = f"{prefix}layers.{number}.") -> Tensor:
            return F.linear(y, weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

        def norm(y: Tensor, name: str, at: str = f"{prefix}layers.{number}.") -> Tensor:
            return F.layer_norm(y, y.shape[-1:], weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"], 1e-5)

        y = norm(x, "self_attn_layer_norm")
        q, k, v = (
            linear(y, f"self_attn.{one}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for one in ("q", "k", "v")
        )
        if xpos_base is not None:
            q, k = xpos(q, xpos_base, False), xpos(k, xpos_base, True)
        y = attention(q, k, v, lengths, rates, is_causal)[0].transpose(1, 2).flatten(2)
        x = x + linear(norm(y, "self_attn.inner_attn_ln"), "self_attn.out_proj")
        y = F.gelu(linear(norm(x, "final_layer_norm"), "ffn.fc1"))
        x = x + linear(norm(y, "ffn.ffn_layernorm"), "ffn.fc2")
        states.append(x)
    return states


def position_table(grid: int, dim: int) -> Tensor:
    """(1 + grid * grid, dim): the class token's zeros, then cell ``row * grid + column``."""
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows = []
    for cell in range(grid * grid):
        halves = [place * omega for place in (cell % grid, cell // grid)]
        rows.append(torch.cat([part for half in halves for part in (half.sin(), half.cos())]))
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.stack(rows)])


def slide_encoder(
    weights: Weights,
    x: Tensor,
    coords: Tensor,
    heads: int,
    lengths: tuple[int, ...],
    rates: tuple[int, ...],
    *,
    grid: int,
    tile: int = 256,
    all_layers: bool = False,
    global_pool: bool = False,
) -> list[Tensor]:
    """GigaPath's ``LongNetViT.forward`` in evaluation mode."""
    x = F.linear(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"])
    cell = torch.floor(coords / tile)
    place = (cell[..., 0] * grid + cell[..., 1]).long() + 1
    x = x + position_table(grid, x.shape[-1])[place].to(x)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1)
    states = layers(weights, x, heads, lengths, rates, "encoder.")
    if not all_layers:
        names = ("encoder.layer_norm.weight", "encoder.layer_norm.bias")
        states = [F.layer_norm(states[-1], x.shape[-1:], *(weights[name] for name in names), 1e-5)]
    last = (x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6)
    return [F.layer_norm(y[:, 1:].mean(1) if global_pool else y[:, 0], *last) for y in states]
