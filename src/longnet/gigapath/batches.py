"""Slides in a batch: checking them, and taking apart those of different sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longnet.models.placement import device_of, dtype_of, is_dispatched
from longnet.runtime.autocast import autocast_dtype
from longnet.runtime.tracing import is_traced


def check_slides(x: Tensor, coords: Tensor, padding_mask: Tensor | None, embed: nn.Module, in_dim: int) -> None:
    """Refuse what ``SlideEncoder.forward`` cannot take; ``embed`` may be wrapped or quantised."""
    device, dtype = device_of(embed), dtype_of(embed, embed)
    for name, tensor in (("x", x), ("coords", coords), ("padding_mask", padding_mask)):
        if name == "padding_mask" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} has type {type(tensor).__name__}: expected a tensor")
        if tensor.device != device and not is_dispatched(embed):
            raise ValueError(f"{name} is on {tensor.device} and the encoder on {device}: expected one device")
    if x.dim() != 3 or x.shape[-1] != in_dim:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (B, L, {in_dim}) tile embeddings")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: expected a floating dtype")
    if x.dtype != dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(
            f"x has dtype {x.dtype} and the encoder {dtype}: expected the same, or autocast around the call"
        )
    if tuple(coords.shape) != (*x.shape[:2], 2):
        raise ValueError(f"coords has shape {tuple(coords.shape)}: expected (B, L, 2) = {(*x.shape[:2], 2)}")
    if padding_mask is None:
        return check_coords(coords)
    if padding_mask.is_meta:
        raise ValueError("padding_mask is on the meta device, so which tiles are absent is not known: expected None")
    if padding_mask.dtype != torch.bool:
        raise TypeError(
            f"padding_mask has dtype {padding_mask.dtype}: expected torch.bool, True where a tile is absent"
        )
    if padding_mask.shape != x.shape[:2]:
        raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}: expected (B, L) = {tuple(x.shape[:2])}")
    check_coords(coords, padding_mask)


def check_coords(coords: Tensor, padding_mask: Tensor | None = None) -> None:
    """Refuse dtypes that cannot hold pixels: half precision moves tiles into other cells.

    float16 holds whole pixels up to 2,048 and is refused where a present tile lies beyond, or where values are not known.
    """
    if coords.dtype == torch.bool or coords.is_complex():
        raise TypeError(f"coords has dtype {coords.dtype}: expected pixels as real numbers")
    if not coords.is_floating_point() or coords.dtype in (torch.float32, torch.float64):
        return
    exact = int(2 / torch.finfo(coords.dtype).eps)
    if coords.dtype == torch.float16 and not coords.is_meta and not is_traced():
        present = coords if padding_mask is None else coords[~padding_mask]
        if bool((present.abs() <= exact).all()):
            return
    raise TypeError(
        f"coords has dtype {coords.dtype}, which rounds pixels beyond {exact:,}: expected integers, float32 or float64, whatever "
        "the dtype of the embeddings is, for rounding moves tiles to other places"
    )


def batched_slides(padding_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slides of one number of tiles together: (their rows (b, 1), the places of their tiles (b, n)).

    Segments and padding follow the number of tiles, so slides of different numbers share no call.
    """
    counts = (~padding_mask).sum(1)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()
        # A stable sort leaves present tiles in their order, before the absent ones.
        order = padding_mask[rows.squeeze(1)].to(torch.uint8).argsort(dim=1, stable=True)
        yield rows, order[:, :count]
