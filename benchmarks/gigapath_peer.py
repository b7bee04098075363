"""Prov-GigaPath's own slide encoder from a checkout; stand-ins replace what it imports besides torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stand_ins import Modules, importable, torchscale_flash
from longnet.gigapath import SlideEncoder
from longnet.gigapath.positions import axis_table, position_embedding


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """timm's: leaves out a sample's residual branch."""
    if drop_prob == 0.0 or not training:
        return x
    kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - drop_prob)
    return x * kept.div_(1 - drop_prob)


def _itself(x: Any, *_: Any, **__: Any) -> Any:
    return x


_LENT: Modules = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {"drop_path": drop_path},
    "timm.models.registry": {"register_model": _itself},
    "fairscale": {},
    "fairscale.nn": {"checkpoint_wrapper": _itself, "wrap": _itself},
    "huggingface_hub": {},
}


def load_upstream(
    gigapath: Path, torchscale: Path | None, like: SlideEncoder, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Its 12-layer encoder with the weights of ``like``, in evaluation mode, and remarks.

    Args:
        gigapath: a checkout of prov-gigapath.
        torchscale: a checkout whose torchscale is used instead of the one that prov-gigapath brings along.

    Raises:
        ModuleNotFoundError: it needs a package that is not there and is not lent. KeyError, RuntimeError: weights that differ.
    """
    paths = [path for path in (torchscale, gigapath, gigapath / "gigapath") if path is not None]
    # Versions of timm differ in what they still have, and nothing of it matters to the result.
    with importable(*paths, more=_LENT, always=("timm", "fairscale")) as missing:
        encoder = importlib.import_module("gigapath.slide_encoder")
        attention = importlib.import_module("torchscale.component.multihead_attention")
    if "flash_attn" in missing or attention.flash_attn_func is None:
        attention.flash_attn_func = torchscale_flash  # type: ignore[attr-defined]
    vit = encoder.LongNetViT
    lengths = list(like.config.segment_lengths)
    # Its own text of the lengths cannot be parsed with numpy 2, and its table of positions takes minutes on a CPU.
    vit.get_optimal_segment_length = lambda *_: str(lengths)
    vit.initialize_vit_weights = lambda self: None
    with torch.device("meta"):
        model = vit(
            embed_dim=like.config.dim, depth=like.config.layers, norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6)
        )
    model = model.to_empty(device=device).eval()
    model.load_state_dict(like.upstream_state_dict())
    grid = like.slide_ngrids
    cell = torch.cartesian_prod(torch.arange(grid, device=device), torch.arange(grid, device=device))
    table = axis_table(grid, like.config.dim // 2, torch.float32, device)
    model.pos_embed[0, 0] = 0
    for part, place in zip(cell.split(1 << 17), model.pos_embed[0, 1:].split(1 << 17), strict=True):
        place.copy_(position_embedding(part, table))
    remarks = [f"torch's own operations stand in for {', '.join(missing)}"] if missing else []
    return model, [*remarks, "its table of positions is filled on the device"]
