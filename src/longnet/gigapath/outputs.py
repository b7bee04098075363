"""What can be taken out of the encoder besides one embedding of the slide, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longnet.gigapath.batches import check_slides
from longnet.gigapath.encoder import SlideEncoder
from longnet.gigapath.passes import Slide, class_token, embed, mean_of_tiles
from longnet.gigapath.positions import Check, axis_table

OUTPUTS = ("embedding", "class", "mean", "tiles", "layers")


def slide_outputs(model: SlideEncoder, x: Tensor, coords: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings of slides, of their tiles and of every layer.

    Args:
        model: the encoder.
        x, coords: as of :meth:`SlideEncoder.forward`, without absent tiles.
        outputs: which to give.

    Returns:
        By the names in ``outputs``. With ``last = norm(encoder_norm(...))`` of all tokens after the last layer:
        ``"embedding"`` (B, C), what :meth:`SlideEncoder.forward` gives: as ``global_pool`` says.
        ``"class"`` (B, C), the class token of ``last``.
        ``"mean"`` (B, C), ``norm`` of the mean of the tiles after ``encoder_norm``: the embedding with ``global_pool``.
        ``"tiles"`` (B, L, C), the tiles of ``last``, each in the context of the slide: for a model that pools them itself.
        ``"layers"`` (B, layers + 1, C), what ``all_layer_embed`` gives: as ``global_pool`` says, with ``norm`` alone.

    Raises:
        ValueError: an unknown output or none; the mean of a slide without tiles; others as of :meth:`SlideEncoder.forward`.
    """
    check_outputs(outputs)
    check_slides(x, coords, None, model.patch_embed, model.in_dim)
    if not x.shape[1] and ("mean" in outputs or model.global_pool):
        raise ValueError("the mean of a slide without tiles does not exist: expected at least one tile")
    table = axis_table(model.slide_ngrids, model.config.dim // 2, model.cls_token.dtype, x.device)
    state, outside = embed(model, Slide(x, coords, table, None, None))
    Check(outside).finish(coords, model.tile_size, model.slide_ngrids)
    pool = mean_of_tiles if model.global_pool else class_token
    states = [pool(state)]
    for block in model.blocks:
        state = block(state)
        states.append(pool(state))
    last = model.encoder_norm(state)
    take = {
        "embedding": lambda: model.norm(pool(last)),
        "class": lambda: model.norm(class_token(last)),
        "mean": lambda: model.norm(mean_of_tiles(last)),
        "tiles": lambda: model.norm(last[:, 1:]),
        "layers": lambda: model.norm(torch.stack(states, dim=1)),
    }
    return {name: take[name]() for name in outputs}


def check_outputs(outputs: Sequence[str]) -> None:
    """Raises ValueError for none, and for one that there is not."""
    if isinstance(outputs, str) or not outputs or any(name not in OUTPUTS for name in outputs):
        given = outputs if isinstance(outputs, str) else list(outputs)
        raise ValueError(f"outputs={given!r}: expected some of {OUTPUTS}, at least one")
