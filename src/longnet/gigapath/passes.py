"""A slide through the encoder, from embeddings to what is read out: one function of tensors, so that it can be compiled whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from longnet.gigapath.layer import run_last_layer, run_layers
from longnet.gigapath.positions import position_embedding
from longnet.models.layers import Block

if TYPE_CHECKING:
    from longnet.gigapath.encoder import SlideEncoder

# A GPU is busy with longer slides for longer than a CPU takes to say what comes next: graphs gain nothing there.
MOST_GRAPHED_TILES = 20_000


class Slide(NamedTuple):
    """What is known of slides before they are encoded.

    Args:
        tiles: (B, L, in_dim).
        cell: (B, L, 2), see :func:`longnet.gigapath.positions.cells`.
        table: see :func:`longnet.gigapath.positions.axis_table`.
        read, times: the tokens that the class token attends to in the last layer, None for all, and their
            :func:`longnet.gigapath.readout.log_times`; None where the mean over the tiles is read.
    """

    tiles: Tensor
    cell: Tensor
    table: Tensor
    read: Tensor | None
    times: Tensor | None


Pass = Callable[["SlideEncoder", Slide, bool], list[Tensor]]


def encode(model: SlideEncoder, slide: Slide, all_layer_embed: bool) -> list[Tensor]:
    """What :meth:`SlideEncoder.forward` gives for slides of one number of tiles."""
    pool = _mean_of_tiles if model.global_pool else _class_token
    x = embed(model, slide)
    states = [pool(x)] if all_layer_embed else []
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    pools = pool if all_layer_embed else None
    if slide.times is None:
        x, pooled = run_layers(blocks, x, model.drop_paths, model.recompute, pools)
        states += pooled
    else:
        if len(blocks) > 1:
            # Nobody reads other tokens of the layer before the last.
            before, drop_paths = blocks[:-1], model.drop_paths[:-1]
            x, pooled = run_layers(before, x, drop_paths, model.recompute, pools, slide.read)
            states += pooled
        x = run_last_layer(blocks[-1], x, slide.times, model.drop_paths[-1])
        if all_layer_embed:
            states.append(pool(x))
    if all_layer_embed:
        return [model.norm(state) for state in states]
    return [model.norm(pool(model.encoder_norm(x)))]


def embed(model: SlideEncoder, slide: Slide) -> Tensor:
    """The class token and the tiles, (B, 1 + L, C), in the residual stream's dtype."""
    x = model.patch_embed(slide.tiles) + position_embedding(slide.cell, slide.table)
    start = model.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
    embedded: Tensor = model.dropout(torch.cat((start, x), dim=1))
    return embedded


def choose_pass(compiled: bool, graphs: bool, tiles: Tensor) -> Pass:
    """:func:`encode` as it is to be run for such tiles (B, L, in_dim)."""
    if not compiled:
        return encode
    if graphs and tiles.is_cuda and tiles.shape[1] <= MOST_GRAPHED_TILES:
        return _replayed
    return compiled_pass(False)


@lru_cache(maxsize=2)
def compiled_pass(graphs: bool) -> Pass:
    """:func:`encode` through ``torch.compile``: norms, casts, dropout and sums are a few kernels instead of dozens.

    One compilation serves slides of any size.

    Args:
        graphs: record what a slide of each size launches, forward and backward, and replay it.
    """
    compiled: Pass = torch.compile(encode, dynamic=True, options={"triton.cudagraphs": True} if graphs else None)
    return compiled


def _replayed(model: SlideEncoder, slide: Slide, all_layer_embed: bool) -> list[Tensor]:
    # The next replay writes its results to the same place.
    return [found.clone() for found in compiled_pass(True)(model, slide, all_layer_embed)]


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def _mean_of_tiles(x: Tensor) -> Tensor:
    return x[:, 1:].mean(dim=1)
