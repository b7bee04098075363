"""The models that are compared: the slide encoder with its head, and two without an encoder, which see no coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longnet.gigapath import SlideEncoder, param_groups_lrd
from longnet.gigapath.heads import SlideHead
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.folders import counted

ENCODER, MEAN_POOLING, ABMIL = "encoder", "mean_pooling", "abmil"
TITLES = {ENCODER: "slide encoder", MEAN_POOLING: "mean pooling + MLP", ABMIL: "ABMIL"}
"""Names of the models in the report."""
RANDOM = "random weights"
_HIDDEN, _GATE = 256, 128


class MeanPooling(nn.Module):
    """An MLP of one hidden layer on the mean of the tiles: (B, L, in_dim) to (B, outputs)."""

    def __init__(self, in_dim: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, _HIDDEN), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_HIDDEN, outputs)
        )

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.layers(x.mean(1))


class AttentionPooling(nn.Module):
    """ABMIL: a weighted mean of projected tiles by gated attention (Ilse et al., arXiv 1802.04712, equation 9)."""

    def __init__(self, in_dim: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(in_dim, _HIDDEN), nn.ReLU(), nn.Dropout(dropout))
        self.value, self.gate = nn.Linear(_HIDDEN, _GATE), nn.Linear(_HIDDEN, _GATE)
        self.score, self.linear = nn.Linear(_GATE, 1), nn.Linear(_HIDDEN, outputs)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        tiles = self.project(x)
        weights = self.score(self.value(tiles).tanh() * self.gate(tiles).sigmoid()).softmax(1)
        return self.linear((weights * tiles).sum(1))


class Probe(nn.Module):
    """The linear layer of a head alone, on read-outs that a frozen encoder gave: (B, 1, C) to (B, outputs)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.linear(x[:, 0])


def titles_of(settings: FinetuneSettings) -> dict[str, str]:
    """:data:`TITLES`, where an encoder without a checkpoint is said to have random weights."""
    return TITLES if settings.checkpoint else TITLES | {ENCODER: f"{TITLES[ENCODER]} ({RANDOM})"}


def describe_encoder(settings: FinetuneSettings) -> str:
    """A sentence: where the encoder's weights come from, its size, and whether it is trained."""
    if settings.checkpoint is None:
        held = f"{RANDOM}, no checkpoint: {counted(settings.depth or 0, 'layer')} of {settings.dim} channels"
    else:
        held = f"the weights of {Path(settings.checkpoint).name}, of architecture {settings.arch}"
    return f"The slide encoder has {held}{'; it is frozen, its head alone is trained' if settings.freeze else ''}."


def make_encoder(settings: FinetuneSettings, in_dim: int) -> SlideEncoder:
    """The encoder of the settings, on the CPU: from its checkpoint, or with random weights.

    Raises:
        ValueError: tiles of other channels than the checkpoint's, or what :meth:`SlideEncoder.from_checkpoint` refuses.
    """
    if settings.checkpoint is None:
        assert settings.dim is not None and settings.depth is not None
        return SlideEncoder(
            settings.dim,
            settings.depth,
            in_dim=in_dim,
            max_wsi_size=settings.max_wsi_size,
            tile_size=settings.tile_size or 256,
            global_pool=settings.global_pool,
            dropout=settings.dropout,
            drop_path=settings.drop_path,
        )
    encoder = SlideEncoder.from_checkpoint(
        settings.checkpoint,
        settings.arch,
        max_wsi_size=settings.max_wsi_size,
        tile_size=settings.tile_size or 256,
        global_pool=settings.global_pool,
        dropout=settings.dropout,
        drop_path=settings.drop_path,
    )
    if encoder.in_dim != in_dim:
        raise ValueError(
            f"{settings.checkpoint}: the weights take {encoder.in_dim} channels; the slides have embeddings of {in_dim} channels"
        )
    return encoder


def make_model(name: str, settings: FinetuneSettings, in_dim: int, outputs: int) -> nn.Module:
    """A model by its name, with random weights of torch's generator where it has no checkpoint.

    Args:
        in_dim: channels of a tile; of the read-outs, for a frozen encoder.
    """
    if name == MEAN_POOLING:
        return MeanPooling(in_dim, outputs, settings.dropout)
    if name == ABMIL:
        return AttentionPooling(in_dim, outputs, settings.dropout)
    if settings.freeze:
        return Probe(in_dim, outputs)
    return SlideHead(make_encoder(settings, in_dim), outputs, layers=settings.layers)


def parameter_groups(name: str, model: nn.Module, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Groups for AdamW: of the encoder with layer-wise decay, see :func:`longnet.gigapath.param_groups_lrd`."""
    if name == ENCODER and not settings.freeze:
        return param_groups_lrd(model, settings.weight_decay, (), settings.layer_decay, lr=settings.lr)
    lr = settings.lr if name == ENCODER else settings.baseline_lr
    weights = list(model.parameters())
    groups = [
        {"params": [one for one in weights if one.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [one for one in weights if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group | {"lr": lr} for group in groups]


@torch.no_grad()
def encode_frozen(head: SlideHead, x: Tensor, coords: Tensor) -> Tensor:
    """What the linear layer of a head reads, (B, C), in evaluation mode."""
    return torch.cat(head.encoder.eval()(x, coords, True, layers=head.layers), -1)
