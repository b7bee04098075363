"""Fine-tuned slide encoders with their heads, from the files that Prov-GigaPath's own fine-tuning writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longnet.gigapath.checkpoint import HEAD, named, read_checkpoint
from longnet.gigapath.encoder import SlideEncoder
from longnet.gigapath.heads import ClassificationHead
from longnet.gigapath.losses import Setting


def from_finetuned(
    path_or_state_dict: str | Path | Mapping[str, object],
    arch: str = "gigapath_slide_enc12l768d",
    *,
    layers: Sequence[int],
    setting: Setting | None = None,
    max_wsi_size: int | None = None,
    tile_size: int = 256,
    global_pool: bool = False,
    freeze: bool = False,
    device: torch.device | str | None = None,
) -> ClassificationHead:
    """A classifier with the weights of a fine-tuned file (``slide_encoder.*`` and ``classifier.0.*``), in evaluation mode.

    Args:
        path_or_state_dict, arch, max_wsi_size, tile_size, global_pool, device: as of :meth:`SlideEncoder.from_checkpoint`.
        layers: the read-outs that the head was trained on, in their order: the original's ``feat_layer``, whose default "11"
            is (11,), one before the last. The file does not hold them.
        setting, freeze: as of :class:`ClassificationHead`.

    Raises:
        ValueError: a file without a head, or whose head does not fit ``layers``; others as of
            :meth:`SlideEncoder.from_checkpoint`.
    """
    checkpoint = read_checkpoint(path_or_state_dict)
    names = [f"{HEAD}0.weight", f"{HEAD}0.bias"]
    if sorted(checkpoint.head) != sorted(names):
        raise ValueError(f"the head has {sorted(checkpoint.head)}: expected {names}, what fine-tuning writes")
    weight, bias = (checkpoint.head[name] for name in names)
    with named(path_or_state_dict):
        encoder = SlideEncoder.from_checkpoint(
            checkpoint.encoder,
            arch,
            max_wsi_size=max_wsi_size,
            tile_size=tile_size,
            global_pool=global_pool,
            device=device,
        )
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != len(layers) * encoder.config.dim:
        raise ValueError(
            f"{names[0]} has shape {tuple(getattr(weight, 'shape', ()))} and layers={tuple(layers)}: expected "
            f"(outputs, {len(layers)} * {encoder.config.dim}), the layers that the head was trained on"
        )
    if not isinstance(bias, Tensor) or tuple(bias.shape) != (len(weight),):
        raise ValueError(f"{names[1]} has shape {tuple(getattr(bias, 'shape', ()))}: expected ({len(weight)},)")
    head = ClassificationHead(encoder, len(weight), layers=layers, setting=setting, freeze=freeze)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(bias)
    return head.eval()
