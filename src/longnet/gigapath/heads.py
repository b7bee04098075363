"""Heads for fine-tuning: a linear layer on what chosen layers of the encoder read out, and the loss of each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.gigapath.encoder import SlideEncoder


class SlideHead(nn.Module):
    """An encoder and a linear layer on the concatenated read-outs of some of its layers: slides to (B, outputs).

    Args:
        encoder: trained along, unless ``freeze``.
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
        if isinstance(outputs, bool) or not isinstance(outputs, int):
            raise TypeError(f"outputs={outputs!r} has type {type(outputs).__name__}: expected an int")
        if outputs < 1:
            raise ValueError(f"outputs={outputs}: expected at least 1")
        states = encoder.config.layers + 1
        if not layers or any(not -states <= layer < states for layer in layers):
            raise ValueError(f"layers={tuple(layers)}: expected indices of the {states} read-outs, at least one")
        self.encoder, self.layers, self.freeze = encoder, tuple(layers), freeze
        if freeze:
            encoder.requires_grad_(False).eval()
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
            states = self.encoder(x, coords, True, padding_mask)
        return self.linear(torch.cat([states[layer] for layer in self.layers], dim=-1))


class ClassificationHead(SlideHead):
    """``outputs`` classes: logits (B, outputs)."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats; target (B,) int64 classes, or (B, outputs) probabilities."""
        return F.cross_entropy(logits.float(), target)


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
