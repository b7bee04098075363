"""Layer-wise learning-rate decay: the parameters of an encoder and its head as groups for an optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from longnet.checks import check_number
from longnet.gigapath.encoder import SlideEncoder


def param_groups_lrd(
    model: nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
    *,
    lr: float,
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``: layers nearer to the tiles learn more slowly (BEiT, arXiv 2106.08254, appendix).

    With L blocks, the head and all else outside of the blocks learn at ``lr``, block i (from 1) at
    ``lr * layer_decay ** (L + 1 - i)``, the projection of the tiles and the class token at ``lr * layer_decay ** (L + 1)``.
    Prov-GigaPath's function of this name leaves the projection at ``lr``: it looks for another name than its model has.

    Args:
        model: a head or anything else that holds one SlideEncoder; also wrapped by DistributedDataParallel, or sharded by
            ``fully_shard`` (call this afterwards).
        weight_decay: of parameters of two and more dimensions; biases and norms have 0.
        no_weight_decay_list: names, as of ``model.named_parameters()``, of others that have 0.
        layer_decay: above 0 and at most 1.
        lr: of the head.

    Returns:
        One dictionary for each depth and weight decay: params, lr, lr_scale (``lr`` times it is the group's lr) and weight_decay.
        Parameters that require no gradient are in no group.

    Raises:
        TypeError, ValueError: a bad value, named; a model with no SlideEncoder or several; a name that no parameter has.
    """
    check_number("layer_decay", layer_decay, 0.0, 1.0, above=True)
    check_number("lr", lr, 0.0)
    check_number("weight_decay", weight_decay, 0.0)
    encoders = [module for module in model.modules() if isinstance(module, SlideEncoder)]
    if len(encoders) != 1:
        raise ValueError(f"model holds {len(encoders)} slide encoders: expected exactly one SlideEncoder")
    if unknown := set(no_weight_decay_list) - {name for name, _ in model.named_parameters()}:
        raise ValueError(f"no_weight_decay_list holds {sorted(unknown)}: expected names of the model's parameters")
    (encoder,) = encoders
    depths = {id(one): 0 for one in (encoder.cls_token, *encoder.patch_embed.parameters())}
    for number, block in enumerate(encoder.blocks, 1):
        depths.update({id(one): number for one in block.parameters()})
    top = len(encoder.blocks) + 1
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths.get(id(parameter), top)
        decay = 0.0 if parameter.ndim <= 1 or name in no_weight_decay_list else weight_decay
        scale = layer_decay ** (top - depth)
        start = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((depth, decay), start)["params"].append(parameter)
    return list(groups.values())
