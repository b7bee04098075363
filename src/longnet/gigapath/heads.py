"""Heads for fine-tuning: a linear layer on what chosen layers of the encoder read out, and the loss of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.checks import check_int
from longnet.gigapath.encoder import SlideEncoder, check_layers

Setting = Literal["multi_class", "multi_label", "binary"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.setting == "multi_label" or logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits, _labels(target, logits))
        if target.shape == logits.shape:
            _check_probabilities(target)
            return F.cross_entropy(logits, target.to(logits.dtype))
        return F.cross_entropy(logits, _classes(target, logits))


class RegressionHead(SlideHead):
    """``outputs`` numbers: (B, outputs)."""

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared error; target (B, outputs).

        Raises:
            ValueError: a target of another shape.
        """
        if target.shape != predicted.shape:
            raise ValueError(f"target has shape {tuple(target.shape)}: expected {tuple(predicted.shape)}")
        return F.mse_loss(predicted.float(), target.float())


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
            ValueError: shapes that differ, or an interval that is none of the outputs.
        """
        batch, intervals = logits.shape
        for name, tensor in (("interval", interval), ("event", event)):
            if tuple(tensor.shape) != (batch,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected (B,) = {(batch,)}")
        if batch and not 0 <= int(interval.min()) <= int(interval.max()) < intervals:
            raise ValueError(f"interval={interval.tolist()}: expected 0 to {intervals - 1}")
        # log(1 - sigmoid(x)) = logsigmoid(-x).
        survived = F.logsigmoid(-logits.float())
        at = interval[:, None]
        before = survived.cumsum(1).gather(1, at) - survived.gather(1, at)
        here = torch.where(event.bool()[:, None], F.logsigmoid(logits.float()).gather(1, at), survived.gather(1, at))
        return -(before + here).mean()

    @staticmethod
    def survival(logits: Tensor) -> Tensor:
        """The chance of getting past each interval, (B, outputs)."""
        return F.logsigmoid(-logits.float()).cumsum(1).exp()


def _labels(target: Tensor, logits: Tensor) -> Tensor:
    batch, labels = logits.shape
    if target.shape != logits.shape and not (labels == 1 and tuple(target.shape) == (batch,)):
        raise ValueError(f"target has shape {tuple(target.shape)}: expected (B, outputs) = {(batch, labels)}")
    _check_range(target)
    return target.reshape(batch, labels).to(logits.dtype)


def _classes(target: Tensor, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if tuple(target.shape) != (batch,):
        raise ValueError(
            f"target has shape {tuple(target.shape)}: expected (B,) = {(batch,)} classes, "
            f"or (B, outputs) = {(batch, classes)} probabilities"
        )
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}: expected classes as integers")
    if batch and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(f"target={target.tolist()}: expected classes from 0 to {classes - 1}")
    return target.long()


def _check_probabilities(target: Tensor) -> None:
    way = "expected probabilities of one softmax; where several labels hold at once, a head with setting='multi_label'"
    if not target.is_floating_point():
        raise TypeError(f"target has dtype {target.dtype} and a value for every class: {way}")
    _check_range(target)
    total = target.sum(1, dtype=torch.float64)
    # Half precision rounds probabilities, and people write three digits.
    off = (total - 1).abs() > max(1e-3, 4 * torch.finfo(target.dtype).eps)
    if bool(off.any()):
        raise ValueError(f"rows of target sum to {total[off].tolist()} instead of 1: {way}")


def _check_range(target: Tensor) -> None:
    if not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError(f"target={target.tolist()}: expected values from 0 to 1")
