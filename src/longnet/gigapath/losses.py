"""The losses of slide tasks as functions of a model's outputs, whatever the model is: heads, and baselines beside them."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Setting = Literal["multi_class", "multi_label", "binary"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


def classification_loss(logits: Tensor, target: Tensor, setting: Setting) -> Tensor:
    """:meth:`longnet.gigapath.ClassificationHead.loss` of a head with this ``setting``."""
    logits = _at_least_float32(logits)
    if setting == "multi_label" or logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, _labels(target, logits))
    if target.shape == logits.shape:
        _check_probabilities(target)
        return F.cross_entropy(logits, target.to(logits.dtype))
    return F.cross_entropy(logits, _classes(target, logits))


def regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """:meth:`longnet.gigapath.RegressionHead.loss`."""
    if target.shape != predicted.shape:
        raise ValueError(f"target has shape {tuple(target.shape)}: expected {tuple(predicted.shape)}")
    if not bool(target.isfinite().all()):
        raise ValueError(f"target={target.tolist()}: expected finite numbers")
    predicted = _at_least_float32(predicted)
    return F.mse_loss(predicted, target.to(predicted.dtype))


def survival_loss(logits: Tensor, interval: Tensor, event: Tensor) -> Tensor:
    """:meth:`longnet.gigapath.SurvivalHead.loss`."""
    batch, intervals = logits.shape
    for name, tensor in (("interval", interval), ("event", event)):
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected (B,) = {(batch,)}")
    if interval.is_floating_point() or interval.is_complex() or interval.dtype == torch.bool:
        raise TypeError(f"interval has dtype {interval.dtype}: expected integers")
    if not bool(((event == 0) | (event == 1)).all()):
        raise ValueError(f"event={event.tolist()}: expected True (1) where it happened, False (0) where it is censored")
    if batch and not 0 <= int(interval.min()) <= int(interval.max()) < intervals:
        raise ValueError(f"interval={interval.tolist()}: expected 0 to {intervals - 1}")
    # log(1 - sigmoid(x)) = logsigmoid(-x).
    logits = _at_least_float32(logits)
    survived = F.logsigmoid(-logits)
    at = interval.long()[:, None]
    before = survived.cumsum(1).gather(1, at) - survived.gather(1, at)
    here = torch.where(event.bool()[:, None], F.logsigmoid(logits).gather(1, at), survived.gather(1, at))
    return -(before + here).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
