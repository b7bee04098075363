"""Heads for fine-tuning: a linear layer on what chosen layers of the encoder read out, and the loss of each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.checks import check_int
from longnet.gigapath.encoder import SlideEncoder, check_layers
from longnet.gigapath.losses import SETTINGS, Setting, classification_loss, regression_loss, survival_loss


class SlideHead(nn.Module):
    """An encoder and a linear layer on the concatenated read-outs of some of its layers: slides to (B, outputs).

    Args:
        encoder: trained along, unless ``freeze``. What the read-outs do not depend on gets ``requires_grad=False``: its
            ``encoder_norm``, and the blocks after the last of ``layers``, which are not computed.
        outputs: numbers per slide.
        layers: read-outs to concatenate, indices into what ``all_layer_embed=True`` gives (0 the embedding, -1 the last).
        freeze: train the linear layer alone; the encoder then stays in evaluation mode.

    Raises:
        TypeError, ValueError: a bad value, named.
    """

    def __init__(
        self, encoder: SlideEncoder, outputs: int, *, layers: Sequence[int] = (-1,), freeze: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(encoder, SlideEncoder):
            raise TypeError(f"encoder has type {type(encoder).__name__}: expected a SlideEncoder")
        check_int("outputs", outputs, 1)
        last = max(check_layers(layers, len(encoder.blocks) + 1))
        self.encoder, self.layers, self.freeze = encoder, tuple(layers), freeze
        if freeze:
            encoder.requires_grad_(False).eval()
        # DistributedDataParallel waits for the gradient of every parameter that requires one.
        for unused in (encoder.encoder_norm, encoder.blocks[last:]):
            unused.requires_grad_(False)
        if last == 0:
            (encoder.cls_token if encoder.global_pool else encoder.patch_embed).requires_grad_(False)
        weight = encoder.cls_token
        self.linear = nn.Linear(len(self.layers) * weight.shape[-1], outputs, device=weight.device, dtype=weight.dtype)

    def train(self, mode: bool = True) -> SlideHead:
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor, coords: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, outputs); arguments and errors as :meth:`SlideEncoder.forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            states = self.encoder(x, coords, True, padding_mask, layers=self.layers)
        return self.linear(torch.cat(states, dim=-1))


class ClassificationHead(SlideHead):
    """Classes or labels of a slide: logits (B, outputs).

    Args:
        setting: what a target is, in the words of Prov-GigaPath's task files.
            ``"multi_class"``: one of ``outputs`` classes. ``"multi_label"``: ``outputs`` labels, each there or not.
            ``"binary"``: there or not, one output; with two outputs the same as two classes, as in the original.
            None: ``"binary"`` of one output, ``"multi_class"`` of more.
    Others as in :class:`SlideHead`.

    Raises:
        TypeError, ValueError: a bad value, named; a setting that does not fit ``outputs``.
    """

    def __init__(
        self,
        encoder: SlideEncoder,
        outputs: int,
        *,
        layers: Sequence[int] = (-1,),
        freeze: bool = False,
        setting: Setting | None = None,
    ) -> None:
        super().__init__(encoder, outputs, layers=layers, freeze=freeze)
        if setting is None:
            setting = "binary" if outputs == 1 else "multi_class"
        if setting not in SETTINGS:
            raise ValueError(f"setting={setting!r} is unknown: expected one of {SETTINGS}")
        if setting == "multi_class" and outputs == 1:
            raise ValueError(
                "setting='multi_class' with outputs=1: the loss of a single class is always 0, expected setting='binary'"
            )
        if setting == "binary" and outputs > 2:
            raise ValueError(f"setting='binary' with outputs={outputs}: expected 1 or 2")
        self.setting: Setting = setting

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss in nats: cross-entropy of one softmax over classes, binary cross-entropy of each label.

        Args:
            logits: (B, outputs).
            target: for classes (B,) integers, or (B, outputs) floating probabilities whose rows sum to 1. For labels
                (B, outputs), of one output also (B,): bool, integers or floats, from 0 (absent) to 1 (there).

        Raises:
            TypeError: probabilities of classes as integers, or classes as floats.
            ValueError: another shape; a class that does not exist; values outside of 0 to 1; rows that do not sum to 1.
        """
        return classification_loss(logits, target, self.setting)


class RegressionHead(SlideHead):
    """``outputs`` numbers: (B, outputs)."""

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared error; target (B, outputs).

        Raises:
            ValueError: a target of another shape, or one that is not finite.
        """
        return regression_loss(predicted, target)


class SurvivalHead(SlideHead):
    """``outputs`` intervals of time: logits (B, outputs) of the hazard, the chance of the event in an interval once reached.

    A discrete-time model: unlike a partial likelihood its loss exists for a single slide.
    """

    def loss(self, logits: Tensor, interval: Tensor, event: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats.

        Args:
            logits: (B, outputs).
            interval: (B,) int64, in which the event happened or observation ended.
            event: (B,) bool, True where it happened; False where observation ended (censored) after that interval.

        Raises:
            TypeError: intervals that are no integers.
            ValueError: shapes that differ, an interval that is none of the outputs, or an event that is neither 0 nor 1.
        """
        return survival_loss(logits, interval, event)

    @staticmethod
    def survival(logits: Tensor) -> Tensor:
        """The chance of getting past each interval, (B, outputs)."""
        return F.logsigmoid(-logits.float()).cumsum(1).exp()
