"""A slide through the encoder, from embeddings to what is read out: two functions of tensors, which can be compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longnet.gigapath.captured import Replays
from longnet.gigapath.layer import gives_rows
from longnet.gigapath.positions import Check, cells, check_cells, position_embedding
from longnet.nn.projections import is_as_its_class
from longnet.runtime.torch_internals import hooks_of, specialised_floats

Layers = tuple[int, ...] | None
Flags = tuple[bool, ...] | None

# A GPU is busy with longer slides for longer than a CPU takes to say what comes next: graphs gain nothing there.
MOST_GRAPHED_TILES = 20_000


class Encoder(nn.Module):
    """What a pass asks of :class:`longnet.gigapath.SlideEncoder`."""

    tile_size: int
    slide_ngrids: int
    global_pool: bool
    compiled: bool
    cuda_graphs: bool
    patch_embed: nn.Module
    cls_token: nn.Parameter
    dropout: nn.Module
    blocks: nn.ModuleList
    encoder_norm: nn.Module
    norm: nn.Module


class Slide(NamedTuple):
    """What is known of slides before they are encoded.

    Args:
        tiles: (B, L, in_dim).
        coords: (B, L, 2), in pixels.
        table: see :func:`longnet.gigapath.positions.axis_table`.
        read, times: the tokens that the class token attends to in the last layer, None for all, and their
            :func:`longnet.gigapath.readout.log_times`; None where all of the last layer is computed.
    """

    tiles: Tensor
    coords: Tensor
    table: Tensor
    read: Tensor | None
    times: Tensor | None


def encode(model: Encoder, slide: Slide, layers: Layers) -> list[Tensor]:
    """What :meth:`SlideEncoder.forward` gives for slides of one number of tiles.

    Args:
        layers: whose results to read out, 0 the embedding; None for the last with ``encoder_norm``.

    Raises:
        ValueError: a tile outside of the grid.
    """
    on_gpu = slide.tiles.is_cuda
    hooks = _hooks(model) if model.compiled else ""
    x, outside = (compiled(embed) if model.compiled else embed)(model, slide, hooks)
    check = None if check_cells(outside) else Check(outside)
    if check is not None and not on_gpu:
        check.finish(slide.coords, model.tile_size, model.slide_ngrids)
    run = compiled(read_out) if model.compiled else read_out
    pooled = _flags(layers)
    function = partial(_call, run, weakref.ref(model), slide.read, slide.times, pooled, hooks)
    graphed = model.compiled and model.cuda_graphs and on_gpu and slide.tiles.shape[1] <= MOST_GRAPHED_TILES
    if graphed and _replays_all(model):
        states = REPLAYS.run(model, (pooled, _settings(model)), function, x)
    else:
        states = function(x)
    if check is not None and on_gpu:
        check.finish(slide.coords, model.tile_size, model.slide_ngrids)
    if layers is None:
        return states
    by_layer = dict(zip(sorted(set(layers)), states, strict=True))
    return [by_layer[layer] for layer in layers]


REPLAYS = Replays()


def _call(
    run: Any, model: Callable[[], Encoder | None], read: Any, times: Any, pooled: Flags, hooks: str, x: Tensor
) -> Any:
    """:func:`read_out`, without keeping the model alive."""
    return run(model(), x, read, times, pooled, hooks)


def _settings(model: Encoder) -> Hashable:
    """What :func:`read_out` depends on besides tensors."""
    names = ("training", "p", "drop_path", "recompute", "chunk", "eps", "definition")
    modules = tuple(tuple(getattr(module, name, None) for name in names) for module in model.modules())
    return model.global_pool, modules


def _hooks(model: Encoder) -> str:
    """The hooks of all modules within: torch.compile does not notice by itself that there are others than before."""
    hooks = [(number, some) for number, module in enumerate(model.modules()) if (some := hooks_of(module))]
    return str(hooks) if hooks else ""


def _replays_all(model: Encoder) -> bool:
    """Whether a CUDA graph of the model does what its modules do: it replays no Python of hooks or of other people's modules."""
    modules = list(model.modules())[1:]
    ours = all(type(one).__module__.startswith(("longnet.", "torch.nn.modules.")) for one in modules)
    return ours and all(is_as_its_class(one, type(one)) for one in modules)


def embed(model: Encoder, slide: Slide, hooks: str = "") -> tuple[Tensor, Tensor]:
    """The class token and the tiles, (B, 1 + L, C), in the residual stream's dtype; whether a tile is outside of the grid.

    Args:
        hooks: see :func:`_hooks`.
    """
    _depend_on(hooks)
    cell, outside = cells(slide.coords, model.tile_size, model.slide_ngrids)
    x = model.patch_embed(slide.tiles) + position_embedding(cell, slide.table)
    start = model.cls_token.expand(x.shape[0], -1, -1).to(x.dtype)
    embedded: Tensor = model.dropout(torch.cat((start, x), dim=1))
    return embedded, outside


def read_out(
    model: Encoder, x: Tensor, read: Tensor | None, times: Tensor | None, pooled: Flags, hooks: str = ""
) -> list[Tensor]:
    """x (B, N, C), see :func:`embed`, through layers and norms; the others as in :class:`Slide`.

    Args:
        pooled: whether to read out the embedding and each layer's result, up to the last layer that is computed; None as in
            :func:`encode`. Flags, because torch.compile would make symbols of numbers.
    """
    _depend_on(hooks)
    pool = mean_of_tiles if model.global_pool else class_token
    blocks = list(model.blocks)[: len(model.blocks) if pooled is None else len(pooled) - 1]
    states = [pool(x)] if pooled is not None and pooled[0] else []
    for number, block in enumerate(blocks, 1):
        x = _run_block(block, x, len(blocks) - number, read, times)
        if pooled is not None and pooled[number]:
            states.append(pool(x))
    if pooled is not None:
        return [model.norm(state) for state in states]
    return [model.norm(pool(model.encoder_norm(x)))]


def _run_block(block: nn.Module, x: Tensor, following: int, read: Tensor | None, times: Tensor | None) -> Tensor:
    """The block's result: all rows, or those that the ``following`` blocks after it read."""
    if times is not None and following == 0:
        return block(x, times=times)
    if read is not None and following == 1:
        return block(x, rows=read) if gives_rows(block) else block(x).index_select(1, read)
    return block(x)


def last_layer(model: Encoder, layers: Layers) -> int:
    """How many blocks have to run."""
    return len(model.blocks) if layers is None else max(layers)


def _flags(layers: Layers) -> Flags:
    return None if layers is None else tuple(number in layers for number in range(max(layers) + 1))


def _depend_on(hooks: str) -> None:
    """Have torch.compile compile anew where they differ: it looks at no argument that is not used."""
    if hooks == "none":
        raise AssertionError


@lru_cache(maxsize=2)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`embed` or :func:`read_out` through ``torch.compile``: norms, casts, dropout and sums are few kernels, not dozens.

    One compilation serves slides of any size. They are compiled apart: the GPU begins with the one while the other's arguments
    are looked at.
    """
    # torch 2.11 makes the buffer of norms' gradients too small where the number of rows is an expression; it gains nothing here.
    return compile_for_any_size(function, options={"triton.mix_order_reduction": False})


def compile_for_any_size(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``torch.compile(function, dynamic=True, **settings)``, once: numbers of modules (eps, a rate of dropout) are constants.

    As symbols, which ``dynamic=True`` would make of them, they have torch trace everything a second time.
    """
    run: Callable[..., Any] = torch.compile(function, dynamic=True, **settings)

    def call(*args: Any) -> Any:
        # Another compilation, which this one is a part of, has made its choice.
        with nullcontext() if torch.compiler.is_compiling() else specialised_floats():
            return run(*args)

    return call


def class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def mean_of_tiles(x: Tensor) -> Tensor:
    return x[:, 1:].mean(dim=1)
