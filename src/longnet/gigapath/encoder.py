"""``SlideEncoder``: Prov-GigaPath's slide encoder (a LongNet over the tiles of a slide) on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longnet.attention.definition import warn_uncovered_by_stack
from longnet.checks import check_int, check_ints
from longnet.compat.attention import TORCHSCALE
from longnet.compat.names import load_theirs, module_names, to_theirs
from longnet.gigapath.architectures import ARCHITECTURES, DILATION_RATES, HEADS, TILE_CHANNELS, segment_lengths
from longnet.gigapath.batches import batched_slides, check_slides
from longnet.gigapath.checkpoint import channels_of, check_architecture, named, read_checkpoint
from longnet.gigapath.layer import RECOMPUTE, Recompute, SlideBlock, gives_first_row, is_separable
from longnet.gigapath.passes import Encoder, Layers, Slide, embed, encode, last_layer
from longnet.gigapath.positions import Check, axis_table
from longnet.gigapath.readout import first_token_weights, log_times, read_by_first_token
from longnet.models import LongNetConfig
from longnet.nn.norm import LayerNorm
from longnet.runtime.tracing import is_traced


class SlideEncoder(Encoder):
    """Tile embeddings and their places to one embedding a slide, as ``gigapath.slide_encoder.LongNetViT`` computes it.

    Args:
        dim, layers, heads: of the encoder; C channels, divisible by 4 and by ``heads``.
        in_dim: channels of a tile embedding.
        max_wsi_size: side of the largest slide, in pixels. With ``tile_size`` it decides the segment lengths, see
            :func:`longnet.gigapath.architectures.segment_lengths`. None: 1,024 tiles, as in the published checkpoints, whatever
            ``tile_size`` is.
        tile_size: side of a tile, in pixels of the coordinates. May be set later: positions follow it, segment lengths stay.
        slide_ngrids: cells of a side of the grid of positions.
        global_pool: read the mean over the tiles instead of the class token.
        torchscale_compat: compute attention as torchscale does, padding and all (see ``longnet.compat``): what checkpoints were
            trained with. False computes this library's exact definition; heads keep their (blocked) offsets.
        dropout, drop_path: probabilities in training; the latter grows from 0 at the first layer to this at the last.
        recompute: what training computes again instead of keeping it, see :mod:`longnet.gigapath.layer`. ``"block"`` is
            gradient checkpointing. May be set later.
        compiled: run the encoder through ``torch.compile``: faster on a GPU, after a wait at the first slide. One compilation
            serves slides of any size. Dropout then draws other numbers. May be set later.
        cuda_graphs: with ``compiled``, capture what a slide of up to 20,000 tiles launches on a GPU, and replay it for slides
            of the same size: for sizes that come again. Each is passed four times at first, and the last eight keep the
            memory of a pass. Where a module has hooks, or is another library's, passes are not captured. May be set later.
        backend: as in :func:`longnet.dilated_attention`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a bad value, named.
    """

    def __init__(
        self,
        dim: int = 768,
        layers: int = 12,
        heads: int = HEADS,
        *,
        in_dim: int = TILE_CHANNELS,
        max_wsi_size: int | None = None,
        tile_size: int = 256,
        slide_ngrids: int = 1000,
        global_pool: bool = False,
        torchscale_compat: bool = True,
        dropout: float = 0.25,
        drop_path: float = 0.1,
        recompute: Recompute = "ffn",
        compiled: bool = False,
        cuda_graphs: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {"in_dim": in_dim, "tile_size": tile_size, "slide_ngrids": slide_ngrids}
        if max_wsi_size is not None:
            counts["max_wsi_size"] = max_wsi_size
        check_ints(1, **counts)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path={drop_path}: expected a probability in [0, 1)")
        if cuda_graphs and not compiled:
            raise ValueError(
                "cuda_graphs=True with compiled=False: only compiled passes are captured, expected compiled=True"
            )
        _check_recompute(recompute)
        self.config = LongNetConfig(
            vocab_size=1,
            dim=dim,
            heads=heads,
            layers=layers,
            segment_lengths=segment_lengths(max_wsi_size, tile_size),
            dilation_rates=DILATION_RATES,
            head_offsets="blocked",
            causal=False,
            use_xpos=False,
            dropout=dropout,
            backend=backend,
        )
        warn_uncovered_by_stack(self.config.layer_attentions())
        if dim % 4:
            raise ValueError(f"dim={dim} is not divisible by 4: positions are a sine and a cosine of two coordinates")
        self.tile_size, self.slide_ngrids, self.global_pool = tile_size, slide_ngrids, global_pool
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.in_dim = in_dim
        self.patch_embed = nn.Linear(in_dim, dim, device=device, dtype=dtype)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.blocks: nn.ModuleList = nn.ModuleList(
            SlideBlock(self.config, layer, drop_path * layer / max(1, layers - 1), device=device, dtype=dtype)
            for layer in range(layers)
        )
        self.recompute = recompute
        self.encoder_norm = LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        if torchscale_compat:
            for block in self.blocks:
                block.attention.definition = TORCHSCALE  # type: ignore[union-attr]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, the class token normal with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels of the coordinates; may be set to a numpy number or a tensor too."""
        return self._tile_size

    @tile_size.setter
    def tile_size(self, value: int) -> None:
        number = value.item() if hasattr(value, "item") else value
        size = int(number) if isinstance(number, float) and number.is_integer() else number
        self._tile_size = check_int("tile_size", size, 1)

    @property
    def recompute(self) -> Recompute:
        """What training computes again, as the constructor's argument says."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        _check_recompute(value)
        self._recompute: Recompute = value
        for module in self.modules():
            if isinstance(module, SlideBlock):
                module.recompute = value

    @classmethod
    def from_checkpoint(
        cls,
        path_or_state_dict: str | Path | Mapping[str, object],
        arch: str = "gigapath_slide_enc12l768d",
        *,
        max_wsi_size: int | None = None,
        tile_size: int = 256,
        slide_ngrids: int = 1000,
        global_pool: bool = False,
        torchscale_compat: bool = True,
        dropout: float = 0.25,
        drop_path: float = 0.1,
        recompute: Recompute = "ffn",
        compiled: bool = False,
        cuda_graphs: bool = False,
        device: torch.device | str | None = None,
    ) -> SlideEncoder:
        """An encoder with a checkpoint's weights, in evaluation mode.

        Args:
            path_or_state_dict: a ``.pth`` (read with ``weights_only=True``), a ``.safetensors``, or the tensors by their
                upstream names; see :func:`longnet.gigapath.checkpoint.read_checkpoint` for the containers and prefixes that are
                recognised. ``in_dim`` is that of the checkpoint. A fine-tuned file's head is left out and logged, see
                :func:`longnet.gigapath.from_finetuned`.
            arch: one of ``ARCHITECTURES``.

        Raises:
            ValueError: an unknown architecture, or keys that are missing, unexpected or of another shape, the first few named.
            OSError: a file that cannot be read.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch={arch!r} is unknown: expected one of {tuple(ARCHITECTURES)}")
        layers, dim = ARCHITECTURES[arch]
        weights = read_checkpoint(path_or_state_dict).encoder
        with named(path_or_state_dict):
            check_architecture(weights, arch)
        model = cls(
            dim,
            layers,
            in_dim=channels_of(weights),
            max_wsi_size=max_wsi_size,
            tile_size=tile_size,
            slide_ngrids=slide_ngrids,
            global_pool=global_pool,
            torchscale_compat=torchscale_compat,
            dropout=dropout,
            drop_path=drop_path,
            recompute=recompute,
            compiled=compiled,
            cuda_graphs=cuda_graphs,
            device=device,
        )
        with named(path_or_state_dict):
            model.load_upstream(weights)
        return model.eval()

    def load_upstream(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights by their upstream names; errors as in :meth:`from_checkpoint`."""
        load_theirs(self, weights, self.upstream_names())

    def upstream_state_dict(self) -> dict[str, Tensor]:
        """The weights by their upstream names, what :meth:`load_upstream` takes."""
        return to_theirs(self, self.upstream_names())

    def upstream_names(self) -> dict[str, str]:
        """This library's names of modules and parameters to upstream's."""
        own = {"patch_embed": "patch_embed.proj", "encoder_norm": "encoder.layer_norm"}
        return module_names(len(self.blocks), "encoder.", cls_token="cls_token", norm="norm", **own)

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        padding_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Encode slides.

        Args:
            x: (B, L, in_dim) tile embeddings, the parameters' dtype (any floating dtype under autocast).
            coords: (B, L, 2) pixels, x then y: integers, float32 or float64, also in a model of half precision.
            all_layer_embed: read out the embedding and every layer, with ``norm`` alone.
            padding_mask: (B, L) bool, True where a tile is absent: a slide's result is that of the slide by itself, and what
                x and coords hold there does not matter.
            layers: give these of what ``all_layer_embed`` gives, indices as into a list of it. Blocks after the last of them are
                not computed.

        Returns:
            ``[(B, C)]``: ``norm(encoder_norm(...))`` of the class token, or of the tiles' mean with ``global_pool``; with
            ``all_layer_embed`` layers + 1 of them.

        Raises:
            TypeError, ValueError: wrong types, shapes or devices; coordinates outside the grid; ``global_pool`` of no tile;
                layers that there are not.
        """
        check_slides(x, coords, padding_mask, self.patch_embed, self.in_dim)
        states = len(self.blocks) + 1
        chosen: Layers = None
        if layers is not None:
            chosen = check_layers(layers, states)
        elif all_layer_embed:
            chosen = tuple(range(states))
        if padding_mask is None:
            return self._encode(x, coords, chosen)
        empty = x.new_empty(0, self.config.dim)
        outcomes = [[empty] for _ in range(1 if chosen is None else len(chosen))]
        order: list[Tensor] = []
        for rows, place in batched_slides(padding_mask):
            order.append(rows)
            for parts, part in zip(outcomes, self._encode(x[rows, place], coords[rows, place], chosen), strict=True):
                parts.append(part)
        if not order:
            return [parts[0] for parts in outcomes]
        back = torch.cat(order, dim=0).flatten().argsort()
        return [torch.cat(parts[1:])[back] for parts in outcomes]

    @torch.no_grad()
    def attention_weights(self, x: Tensor, coords: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """How much the class token attends to each tile: (layers, B, heads, L), float32 (float64 for a float64 model).

        Exact: the weight of the tile in the class token's softmax over all branches. What is missing to 1 is the class
        token's attention to itself. Absent tiles have 0. Arguments and errors as in :meth:`forward`.

        Raises:
            ValueError: also for a block, or its attention, that was wrapped or replaced: its queries and keys are not known.
        """
        check_slides(x, coords, padding_mask, self.patch_embed, self.in_dim)
        if padding_mask is None:
            return self._weights(x, coords)
        kind = torch.promote_types(self.cls_token.dtype, torch.float32)
        weights = x.new_zeros(len(self.blocks), x.shape[0], self.config.heads, x.shape[1], dtype=kind)
        for rows, place in batched_slides(padding_mask):
            some = self._weights(x[rows, place], coords[rows, place])
            for number, row in enumerate(rows.flatten().tolist()):
                weights[:, row].index_copy_(2, place[number], some[:, number])
        return weights

    def _encode(self, x: Tensor, coords: Tensor, layers: Layers) -> list[Tensor]:
        if self.global_pool and not x.shape[1]:
            raise ValueError(
                "global_pool=True of a slide without tiles: their mean does not exist, expected at least one"
            )
        return encode(self, self._slide(x, coords, layers), layers)

    def _weights(self, x: Tensor, coords: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            known = isinstance(block, SlideBlock) and type(block).forward is SlideBlock.forward
            if not (known and "forward" not in block.__dict__ and is_separable(block.attention)):
                raise ValueError(
                    f"blocks[{number}] is a {type(block).__name__} that was wrapped, replaced or changed, or its attention was: "
                    "attention_weights finds no queries and keys there; expected the encoder's own"
                )
        kind = torch.promote_types(self.cls_token.dtype, torch.float32)
        length, device = 1 + x.shape[1], x.device
        x, outside = embed(self, Slide(x, coords, self._table(device), None, None))
        Check(outside).finish(coords, self.tile_size, self.slide_ngrids)
        weights: list[Tensor] = []
        for number, block in enumerate(self.blocks, 1):
            attention = block.attention
            times = log_times(attention.pattern, attention.heads, length, device, kind)  # type: ignore[union-attr, arg-type]

            def record(query: Tensor, key: Tensor, times: Tensor = times) -> None:
                weights.append(first_token_weights(query, key, times)[:, :, 1:])

            last = number == len(self.blocks) and gives_first_row(block)
            x = block(x, times=times, record=record) if last else block(x, record=record)
        return torch.stack(weights)

    def _table(self, device: torch.device) -> Tensor:
        return axis_table(self.slide_ngrids, self.config.dim // 2, self.cls_token.dtype, device)

    def _slide(self, x: Tensor, coords: Tensor, layers: Layers) -> Slide:
        """What the layers are given."""
        table, count = self._table(x.device), last_layer(self, layers)
        last = self.blocks[count - 1] if count else None
        if self.global_pool or not isinstance(last, SlideBlock) or not gives_first_row(last):
            return Slide(x, coords, table, None, None)
        attention, length = last.attention, 1 + x.shape[1]
        shape = (attention.pattern, attention.heads, length, x.device)
        kind = torch.promote_types(self.cls_token.dtype, torch.float32)
        # How many tokens are read depends on the length: not known where torch traces.
        if count == 1 or is_traced():
            return Slide(x, coords, table, None, log_times(*shape, kind))
        some = read_by_first_token(*shape)
        # Compiled, all sizes are to be one graph.
        partly = self.compiled or len(some) < length
        return Slide(x, coords, table, some if partly else None, log_times(*shape, kind, partly))


def _check_recompute(value: str) -> None:
    if value not in RECOMPUTE:
        raise ValueError(f"recompute={value!r} is unknown: expected one of {RECOMPUTE}")


def check_layers(layers: Sequence[int], states: int) -> tuple[int, ...]:
    """Indices of read-outs, counted from 0.

    Raises:
        ValueError: none, or one that there is not.
    """
    if not layers or any(not -states <= layer < states for layer in layers):
        raise ValueError(f"layers={tuple(layers)}: expected indices of the {states} read-outs, at least one")
    return tuple(layer % states for layer in layers)
