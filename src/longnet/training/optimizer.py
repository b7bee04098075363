"""The optimizer of a run: AdamW, or Muon for the matrices of the blocks and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longnet.training.models import Model
from longnet.training.muon import Muon
from longnet.training.settings import TrainSettings


def make_optimizer(model: Model, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings. The rate of each of its groups is the peak; the first group's is ``settings.lr``.

    Muon trains the weights of the linear layers in the blocks. AdamW trains all others: the embedding, a head of its own, norms
    and biases. What has one dimension does not decay.
    """
    matrices = _matrices(model) if settings.optimizer == "muon" else []
    taken = {id(matrix) for matrix in matrices}
    weights = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in taken]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    fused = weights[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=fused)
    if not matrices:
        return adamw
    return _Together([adamw, Muon(matrices, settings.peak_matrix_lr, settings.weight_decay)])


def _matrices(model: Model) -> list[Tensor]:
    # transformers' Conv1D, GPT-2's, is a linear layer whose matrix is transposed.
    linears: list[Any] = [
        module
        for block in model.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    return [linear.weight for linear in linears if linear.weight.requires_grad]


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, torch.Size]]:
    """What an optimizer of :func:`make_optimizer` keeps of every weight after its first step: names and shapes."""
    shapes: dict[Tensor, dict[str, torch.Size]] = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            moments = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
            steps = {} if "momentum" in group else {"step": torch.Size()}
            shapes[weight] = {**steps, **dict.fromkeys(moments, weight.shape)}
    return shapes


class _Together(torch.optim.Optimizer):
    """Several optimizers as one, with their groups and one state: a scaler of gradients skips a step of all or of none."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        for part in self._parts:
            part.step()
