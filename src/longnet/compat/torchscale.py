"""torchscale's LongNet encoder, decoder and LongViT as models of this library, and back.

A state dict does not say how many heads there are, which segments and rates, or whether the embedding is scaled: the caller does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.attention import DilatedAttention
from longnet.compat.attention import TORCHSCALE
from longnet.compat.names import load_theirs, module_names, to_theirs, unwrap
from longnet.geometry.phantoms import padded_length
from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM

_XPOS = "self_attn.xpos.scale"


def encoder_from_torchscale(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    torchscale_compat: bool = True,
    scale_embedding: bool = False,
    xpos_scale_base: float = 512.0,
) -> LongNetEncoder:
    """A ``LongNetEncoder`` of torchscale with sub-LayerNorm, its default; in evaluation mode.

    Without ``embed_tokens`` it takes embeddings only; without ``layer_norm`` (``normalize_output=False``) there is no last norm.

    Args:
        weights: its state dict, also in ``{"model": ...}`` or ``{"state_dict": ...}``, or with a prefix in front of all keys;
            the logger ``longnet`` says what was taken off.
        heads, segment_lengths, dilation_rates: as its config says.
        torchscale_compat: compute attention as torchscale does, see ``longnet.compat``; False is the exact definition, with the
            same (blocked) head offsets.
        scale_embedding: ``no_scale_embedding=False`` there.
        xpos_scale_base: as there; used where the weights say that there is xPos.

    Raises:
        TypeError, ValueError: a bad argument, named; keys that are missing, unexpected or of another shape, the first few named.
    """
    weights = unwrap(weights, "layers.")
    model = LongNetEncoder(_config(weights, heads, segment_lengths, dilation_rates, xpos_scale_base, causal=False))
    if "layer_norm.weight" not in weights:
        model.norm = NoNorm()
    _finish(model, weights, torchscale_compat, scale_embedding)
    return model


def decoder_from_torchscale(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    torchscale_compat: bool = True,
    scale_embedding: bool = False,
    xpos_scale_base: float = 512.0,
) -> LongNetLM:
    """A ``LongNetDecoder`` of torchscale with its output projection, tied or not; arguments as of the encoder.

    A decoder's phantom keys come after every query, so where every w is a multiple of its r ``torchscale_compat`` changes
    nothing and generation has its cache. Elsewhere outputs of later segments are shifted, and a cache is refused.

    Raises:
        As :func:`encoder_from_torchscale`.
    """
    weights = unwrap(weights, "layers.")
    table, head = weights.get("embed_tokens.weight"), weights.get("output_projection.weight")
    tied = isinstance(table, Tensor) and isinstance(head, Tensor) and torch.equal(table, head)
    model = LongNetLM(
        _config(weights, heads, segment_lengths, dilation_rates, xpos_scale_base, causal=True, tie_embeddings=tied)
    )
    _finish(model, weights, torchscale_compat, scale_embedding)
    return model


class LongViT(nn.Module):
    """torchscale's LongViT: images (B, channels, S, S) to patch states (B, patches, dim), without a last norm.

    Args:
        encoder: takes embeddings.
        patch_size: side of a patch, in pixels.
        patches: of an image, a square number.
        channels: of an image.
    """

    def __init__(self, encoder: LongNetEncoder, patch_size: int, patches: int, channels: int = 3) -> None:
        super().__init__()
        dim, side = encoder.config.dim, math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"patches={patches} is no square number: expected those of a square image")
        self.size = side * patch_size
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, dim))
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """(B, patches, dim).

        Raises:
            ValueError: an image of another size than the positions are for.
        """
        channels = self.patch_embed.in_channels
        if tuple(image.shape[1:]) != (channels, self.size, self.size):
            raise ValueError(
                f"image has shape {tuple(image.shape)}: expected (B, {channels}, {self.size}, {self.size})"
            )
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        return self.encoder(embeddings=x + self.pos_embed)


def longvit_from_torchscale(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    torchscale_compat: bool = True,
    image_size: int | None = None,
) -> LongViT:
    """A LongViT; other arguments and errors as of :func:`encoder_from_torchscale`.

    Args:
        image_size: side of the images, in pixels: positions are interpolated to it (bicubic, as LongViT's own fine-tuning does
            for larger images). None: that of the weights.

    Raises:
        ValueError: also an image_size that is no multiple of a patch.
    """
    weights = unwrap(weights, "encoder.layers.")
    encoder = LongNetEncoder(
        _config(weights, heads, segment_lengths, dilation_rates, 512.0, prefix="encoder.", causal=False)
    )
    encoder.norm = NoNorm()
    patch, places = _tensor(weights, "patch_embed.proj.weight", 4), _tensor(weights, "pos_embed", 3)
    if image_size is not None:
        places = _resized(places, image_size, patch.shape[-1])
        weights = {**weights, "pos_embed": places}
    model = LongViT(encoder, patch.shape[-1], places.shape[1], patch.shape[1])
    _finish(model, weights, torchscale_compat, scale_embedding=True)
    return model


def to_torchscale(model: LongNetEncoder | LongNetLM | LongViT) -> dict[str, Tensor]:
    """The model's weights by torchscale's names, with the buffers that torchscale keeps; tensors are shared, not copied.

    Raises:
        TypeError: another model. ValueError: one that torchscale has no names for.
    """
    if not isinstance(model, (LongNetEncoder, LongNetLM, LongViT)):
        raise TypeError(f"model has type {type(model).__name__}: expected a LongNetEncoder, a LongNetLM or a LongViT")
    config = _config_of(model)
    plain = LongNetConfig(
        vocab_size=config.vocab_size, dim=config.dim, heads=config.heads, layers=config.layers, ffn_dim=config.ffn_dim,
        segment_lengths=config.segment_lengths, dilation_rates=config.dilation_rates, causal=config.causal,
        use_xpos=config.use_xpos, head_offsets="blocked", xpos_scale_base=config.xpos_scale_base,
    )  # fmt: skip
    differing = [
        name
        for name in ("kv_heads", "norm", "qk_norm", "bias", "use_rel_pos_bias", "head_offsets", "head_numbers")
        if getattr(config, name) != getattr(plain, name)
    ]
    if differing:
        said = ", ".join(f"{name}={getattr(config, name)!r}" for name in differing)
        raise ValueError(f"config has {said}: torchscale has no such LongNet")
    weights = to_theirs(model, _names(model))
    if isinstance(model, LongNetLM) and model.head is None:
        weights["output_projection.weight"] = weights["embed_tokens.weight"]
    if config.use_xpos:
        weights |= {f"layers.{layer}.{_XPOS}": _xpos_scale(config.head_dim) for layer in range(config.layers)}
    return weights


class NoNorm(nn.Module):
    """Stands where another model has its last norm."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return x

    def reset_parameters(self) -> None:
        """There are none."""


def _config_of(model: LongNetEncoder | LongNetLM | LongViT) -> LongNetConfig:
    return model.encoder.config if isinstance(model, LongViT) else model.config


def _names(model: LongNetEncoder | LongNetLM | LongViT) -> dict[str, str]:
    layers = _config_of(model).layers
    if isinstance(model, LongViT):
        return module_names(layers, "encoder.", "encoder.", patch_embed="patch_embed.proj", pos_embed="pos_embed")
    more = {"head": "output_projection"} if isinstance(model, LongNetLM) else {}
    if model.config.vocab_size > 1:
        more["embedding"] = "embed_tokens"
    return module_names(layers, norm="layer_norm", **more)


def _config(
    weights: Mapping[str, Tensor],
    heads: int,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    xpos_scale_base: float,
    *,
    prefix: str = "",
    **more: Any,
) -> LongNetConfig:
    layers = f"{prefix}layers."
    numbers = {int(found[1]) for name in weights if (found := re.match(re.escape(layers) + r"(\d+)\.", name))}
    if not numbers:
        under = {found[1] for name in weights if (found := re.match(rf"(.+\.){re.escape(layers)}\d+\.", name))}
        hint = f"; there are under {min(under)!r}: give the weights without this prefix" if under else ""
        raise ValueError(
            f"weights hold no {layers}0 among {sorted(weights)[:5]}{hint}; expected a state dict of torchscale's LongNet"
        )
    hidden = _tensor(weights, f"{layers}0.ffn.fc1.weight", 2)
    table = weights.get("embed_tokens.weight")
    has_xpos = f"{layers}0.{_XPOS}" in weights
    return LongNetConfig(
        # Without a vocabulary there still is a table, of one token that is never read.
        vocab_size=table.shape[0] if isinstance(table, Tensor) else 1,
        dim=hidden.shape[1],
        heads=heads,
        layers=max(numbers) + 1,
        ffn_dim=hidden.shape[0],
        segment_lengths=segment_lengths,  # type: ignore[arg-type]
        dilation_rates=dilation_rates,  # type: ignore[arg-type]
        head_offsets="blocked",
        use_xpos=has_xpos,
        xpos_scale_base=xpos_scale_base if has_xpos else None,
        **more,
    )


def _resized(places: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Positions (1, patches, C) of a square image for one of another size."""
    side, before = image_size // patch_size, math.isqrt(places.shape[1])
    if side < 1 or image_size % patch_size or before**2 != places.shape[1]:
        raise ValueError(
            f"image_size={image_size} with patches of {patch_size} pixels and {places.shape[1]} positions: expected a multiple "
            "of the patch, and positions of a square image"
        )
    grid = places.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _tensor(weights: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    tensor = weights.get(name)
    if not isinstance(tensor, Tensor) or tensor.dim() != dimensions:
        said = "missing" if tensor is None else f"{tuple(getattr(tensor, 'shape', ()))}"
        raise ValueError(f"weights[{name!r}] is {said}: expected a tensor of {dimensions} dimensions")
    return tensor


def _finish(
    model: LongNetEncoder | LongNetLM | LongViT, weights: Mapping[str, Tensor], compat: bool, scale_embedding: bool
) -> None:
    own = {name: x for name, x in weights.items() if not name.endswith(_XPOS)}
    dtypes = {x.dtype for x in own.values() if isinstance(x, Tensor)}
    model.to(next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    if isinstance(model, LongNetLM) and model.head is None:
        del own["output_projection.weight"]
    load_theirs(model, own, _names(model))
    if not scale_embedding and not isinstance(model, LongViT):
        model.embedding_scale = 1.0
    for module in model.modules():
        if compat and isinstance(module, DilatedAttention) and not _is_the_definition(module):
            module.definition = TORCHSCALE
    model.eval()


def _is_the_definition(attention: DilatedAttention) -> bool:
    """Whether torchscale's padding cannot show: phantoms come after all queries, and no segment is padded."""
    return attention.causal and all(
        padded_length(branch) == branch.segment_length for branch in attention.pattern.branches
    )


def _xpos_scale(head_dim: int) -> Tensor:
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
