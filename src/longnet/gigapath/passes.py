"""A slide through the encoder, from embeddings to what is read out: two functions of tensors, which can be compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longnet.gigapath.captured import Replays
from longnet.gigapath.layer import run_last_layer, run_layers
from longnet.gigapath.positions import Check, cells, position_embedding
from longnet.models.layers import Block

if TYPE_CHECKING:
    from longnet.gigapath.encoder import SlideEncoder

# A GPU is busy with longer slides for longer than a CPU takes to say what comes next: graphs gain nothing there.
MOST_GRAPHED_TILES = 20_000


class Slide(NamedTuple):
    """What is known of slides before they are encoded.

    Args:
        tiles: (B, L, in_dim).
        coords: (B, L, 2), in pixels.
        table: see :func:`longnet.gigapath.positions.axis_table`.
        read, times: the tokens that the class token attends to in the last layer, None for all, and their
            :func:`longnet.gigapath.readout.log_times`; None where the mean over the tiles is read.
    """

    tiles: Tensor
    coords: Tensor
    table: Tensor
    read: Tensor | None
    times: Tensor | None


def encode(model: SlideEncoder, slide: Slide, all_layer_embed: bool) -> list[Tensor]:
    """What :meth:`SlideEncoder.forward` gives for slides of one number of tiles.

    Raises:
        ValueError: a tile outside of the grid.
    """
    on_gpu = slide.tiles.is_cuda
    x, outside = (compiled(embed) if model.compiled else embed)(model, slide)
    check = Check(outside)
    if not on_gpu:
        check.finish(slide.coords, model.tile_size, model.slide_ngrids)
    run = compiled(read_out) if model.compiled else read_out
    function = partial(_call, run, weakref.ref(model), slide.read, slide.times, all_layer_embed)
    if model.compiled and model.cuda_graphs and on_gpu and slide.tiles.shape[1] <= MOST_GRAPHED_TILES:
        found = REPLAYS.run(model, (all_layer_embed, _settings(model)), function, x)
    else:
        found = function(x)
    if on_gpu:
        check.finish(slide.coords, model.tile_size, model.slide_ngrids)
    return found


REPLAYS = Replays()


def _call(
    run: Any, model: Callable[[], SlideEncoder | None], read: Any, times: Any, all_layer_embed: bool, x: Tensor
) -> Any:
    """:func:`read_out`, without keeping the model alive."""
    return run(model(), x, read, times, all_layer_embed)


def _settings(model: SlideEncoder) -> Hashable:
    """What :func:`read_out` depends on besides tensors."""
    blocks = [(block.training, block.dropout.p) for block in model.blocks if isinstance(block, Block)]
    return model.training, model.recompute, model.drop_paths, model.global_pool, tuple(blocks)


def embed(model: SlideEncoder, slide: Slide) -> tuple[Tensor, Tensor]:
    """The class token and the tiles, (B, 1 + L, C), in the residual stream's dtype; whether a tile is outside of the grid."""
    cell, outside = cells(slide.coords, model.tile_size, model.slide_ngrids)
    x = model.patch_embed(slide.tiles) + position_embedding(cell, slide.table)
    start = model.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
    embedded: Tensor = model.dropout(torch.cat((start, x), dim=1))
    return embedded, outside


def read_out(
    model: SlideEncoder, x: Tensor, read: Tensor | None, times: Tensor | None, all_layer_embed: bool
) -> list[Tensor]:
    """x (B, N, C), see :func:`embed`, through all layers and norms; the others as in :class:`Slide`."""
    pool = _mean_of_tiles if model.global_pool else _class_token
    states = [pool(x)] if all_layer_embed else []
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    # Of a single token nobody reads others of the layer before.
    whole = len(blocks) if times is None else len(blocks) - 1
    if whole:
        pools = pool if all_layer_embed else None
        x, pooled = run_layers(blocks[:whole], x, model.drop_paths[:whole], model.recompute, pools, read)
        states += pooled
    if times is not None:
        x = run_last_layer(blocks[-1], x, times, model.drop_paths[-1])
        if all_layer_embed:
            states.append(pool(x))
    if all_layer_embed:
        return [model.norm(state) for state in states]
    return [model.norm(pool(model.encoder_norm(x)))]


@lru_cache(maxsize=2)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`embed` or :func:`read_out` through ``torch.compile``: norms, casts, dropout and sums are few kernels, not dozens.

    One compilation serves slides of any size. They are compiled apart: the GPU begins with the one while the other's arguments
    are looked at.
    """
    # torch 2.11 gets the room for norms' gradients wrong where the number of rows is an expression; it gains nothing here.
    options: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(function, dynamic=True, options=options)


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def _mean_of_tiles(x: Tensor) -> Tensor:
    return x[:, 1:].mean(dim=1)
