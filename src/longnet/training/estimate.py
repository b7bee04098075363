"""What a step of a run will take, before the run begins: memory from shapes, time from a matrix product on the device."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from longnet.distributed import GATHERED_AS_ONE
from longnet.geometry.cost import score_pairs
from longnet.models import LongNetConfig, LongNetLM
from longnet.models.layers import Block, FeedForward
from longnet.models.loss import positions_at_once
from longnet.nn.norm import make_norm
from longnet.runtime.torch_internals import fake_tensors
from longnet.training.device import autocast
from longnet.training.optimizer import make_optimizer, state_shapes
from longnet.training.progress import format_seconds
from longnet.training.settings import TrainSettings

SHARE = 0.35
"""The share of a matrix product's speed that a whole step is assumed to reach, a guess: norms, GELU and the optimizer compute
little and read much, and attention multiplies smaller matrices."""

# A product is timed that takes this many seconds, or one with as many rows as a forward pass has tokens.
_LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a process holds at the peak of a step.

    Attributes:
        weights: of the model. Of several processes each holds a share, and the weights of two blocks and of what is in no
            block as a whole; of a small model, which is gathered as one, all weights and their gradients.
        gradients: as many as a process's share of the weights.
        optimizer: AdamW's two moments of a weight, Muon's one of a matrix.
        activations: what the forward pass saves for the backward pass, and the most that is computed again at one time.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(
    settings: TrainSettings, device: torch.device, *, dp: int = 1, cp: int = 1, longest: int | None = None
) -> StepMemory:
    """The memory of a step without ``torch.compile``, from a forward pass of each kind of layer on tensors without memory.

    Args:
        settings: of the run.
        device: which kernels run, and so what is saved, depends on it.
        dp, cp: windows trained on side by side, and processes that share each.
        longest: tokens of the longest part of a window; by default parts are equal.
    """
    model = LongNetLM(_longnet_of(settings), device="meta", dtype=getattr(torch, settings.weights))
    of_blocks = [_weight_bytes(block) for block in model.blocks]
    whole, ranks = _weight_bytes(model), dp * cp
    own = -(-whole // ranks)
    if ranks == 1:
        gathered = 0
    elif whole <= GATHERED_AS_ONE:
        gathered = 2 * whole
    else:
        gathered = 2 * max(of_blocks) + whole - sum(of_blocks)
    shape = (settings.batch // dp, longest or -(-settings.context // cp))
    moments = -(-_moment_bytes(model, settings) // ranks)
    return StepMemory(own + gathered, own, moments, _activations(settings, device, *shape))


def step_flops(settings: TrainSettings, *, dp: int = 1, cp: int = 1) -> int:
    """FLOPs (multiplications plus additions) of a process in a step: matrix products of weights, of attention's pairs, of Muon.

    The mean over the processes.

    Args:
        settings, dp, cp: as in :func:`step_memory`.
    """
    config, windows = _longnet_of(settings), settings.batch * settings.accumulate
    of_token, of_pair = window_flops(config)
    pairs = sum(
        score_pairs(layer.pattern, layer.heads, settings.context, True, segment_offset=layer.segment_offset)
        for layer in config.layer_attentions()
    )
    return (windows * (settings.context * of_token + pairs * of_pair) + _muon_flops(settings)) // (dp * cp)


@lru_cache(maxsize=64)
def window_flops(config: LongNetConfig) -> tuple[int, int]:
    """FLOPs of a token and of a query-key pair in a step, forward and backward.

    A weight takes 2 FLOPs a token forward and 4 backward, a pair ``4 * D`` forward and ``10 * D`` backward. What is computed
    again in the backward pass counts again.
    """
    is_recomputed, is_chunked = config.gradient_checkpointing, config.feed_forward_chunk is not None
    # Weights forward, and again in the backward pass. Logits are computed twice.
    forward, again = config.dim * config.vocab_size, config.dim * config.vocab_size
    for block in LongNetLM(config, device="meta").blocks:
        size = sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))
        half = config.dim * config.feed_forward_dim
        forward += size
        # What is recomputed ends before fc2, whose result is not needed.
        again += size - half if is_recomputed else half * is_chunked
    return 6 * forward + 2 * again, (18 if is_recomputed else 14) * config.head_dim


def _muon_flops(settings: TrainSettings) -> int:
    """Of its iterations: products of a matrix (long, short) with itself, of the result with itself, and of both."""
    groups = make_optimizer(LongNetLM(_longnet_of(settings), device="meta"), settings).param_groups
    flops = 0
    for group in groups:
        for short, long in (sorted(matrix.shape) for matrix in group["params"] if "ns_steps" in group):
            flops += group["ns_steps"] * (4 * short**2 * long + 2 * short**3)
    return flops


def product_speed(settings: TrainSettings, device: torch.device) -> float:
    """FLOPs a second of a product of the feed-forward's shape in the dtype of the run: the median of five."""
    config, dtype = _longnet_of(settings), getattr(torch, settings.dtype)
    most = settings.batch * settings.context
    weight = torch.randn(config.feed_forward_dim, config.dim, device=device, dtype=dtype)
    rows, seconds = min(16, most), 0.0
    while True:
        x = torch.randn(rows, config.dim, device=device, dtype=dtype)
        _seconds_of_product(x, weight)  # The first one also loads or chooses a kernel.
        seconds = _seconds_of_product(x, weight)
        if rows == most or seconds >= _LEAST_SECONDS:
            break
        rows = min(2 * rows, most)
    seconds = statistics.median([seconds, *(_seconds_of_product(x, weight) for _ in range(4))])
    return 2 * rows * weight.numel() / seconds


def describe_step(
    settings: TrainSettings,
    device: torch.device,
    *,
    dp: int = 1,
    cp: int = 1,
    longest: int | None = None,
    steps_done: int = 0,
    seconds_done: float = 0.0,
) -> list[str]:
    """Lines for the user: the memory of a step, whether the device has less, and the time of a step.

    Args:
        settings, device, dp, cp, longest: as in :func:`step_memory`.
        steps_done, seconds_done: of a run that is resumed.
    """
    memory, free = step_memory(settings, device, dp=dp, cp=cp, longest=longest), free_memory(device)
    each = "" if dp * cp == 1 else " in each process"
    lines = [
        f"Memory of a step{each}: about {format_bytes(memory.total)}. Weights {format_bytes(memory.weights)}, gradients "
        f"{format_bytes(memory.gradients)}, optimizer {format_bytes(memory.optimizer)}, activations (what the forward pass "
        f"saves for the backward pass) {format_bytes(memory.activations)}"
    ]
    if free is not None and memory.total > free:
        lines.append(
            f"That is more than the {format_bytes(free)} that {device} has. If memory runs out, try {_remedies(settings)}"
        )
    speed = product_speed(settings, device)
    seconds = step_flops(settings, dp=dp, cp=cp) / (SHARE * speed)
    length = _length(settings, seconds, steps_done, seconds_done)
    lines.append(
        f"Time of a step: about {_in_words(seconds)}, {length}. A matrix product reaches {_in_flops(speed)} here, "
        f"and a step is assumed to reach {SHARE:.0%} of that"
    )
    return lines


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or that the machine of a CPU has in all; None where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        # Windows has no sysconf, and other systems other names.
        return None


def format_bytes(count: int) -> str:
    """``3 << 20`` as ``3.0 MiB``."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.1f} {unit}"
    return f"{count / (1 << 10):,.1f} KiB"


def _activations(settings: TrainSettings, device: torch.device, batch: int, length: int) -> int:
    """Bytes that a forward pass saves for ``batch`` windows of ``length`` tokens, and the most computed again at one time."""
    config, dtype = _longnet_of(settings), getattr(torch, settings.dtype)
    made: dict[str, Any] = {"device": device, "dtype": getattr(torch, settings.weights)}
    layers = config.layer_attentions()
    with fake_tensors(), autocast(device, dtype):
        x = torch.empty(batch, length, config.dim, requires_grad=True, **made)
        of_kind = {kind: _saved_bytes(Block(config, layers.index(kind), **made), x) for kind in dict.fromkeys(layers)}
        of_norm = _saved_bytes(make_norm(config.norm, config.dim, **made), x)
        of_chunk = 0
        if config.feed_forward_chunk is not None:
            whole = FeedForward(config.replace(feed_forward_chunk=None), **made)
            of_chunk = _saved_bytes(whole, x[:, : config.feed_forward_chunk])
    # Logits of the dtype and of float32, what cross-entropy saves, and its gradient.
    chunk = positions_at_once(config.loss_chunk, config.vocab_size)
    logits = min(chunk, batch * length) * config.vocab_size * (dtype.itemsize + 3 * 4)
    if not config.gradient_checkpointing:
        return sum(count * of_kind[kind] for kind, count in Counter(layers).items()) + of_norm + max(of_chunk, logits)
    return config.layers * x.nbytes + of_norm + max(max(of_kind.values()) + of_chunk, logits)


def _longnet_of(settings: TrainSettings) -> LongNetConfig:
    if not isinstance(settings.model, LongNetConfig):
        raise TypeError(
            f"model has type {type(settings.model).__name__}: expected a LongNetConfig, estimates are of LongNets"
        )
    return settings.model


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves in a call of the module, each storage once and its own weights left out."""
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in module.parameters()}
    saved: dict[StorageWeakRef, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        return saved.setdefault(StorageWeakRef(tensor.untyped_storage()), tensor)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        module(x)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in weights)


def _weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _moment_bytes(model: LongNetLM, settings: TrainSettings) -> int:
    kept = state_shapes(make_optimizer(model, settings))
    return sum(
        weight.element_size() * shape.numel() for weight, shapes in kept.items() for shape in shapes.values() if shape
    )


def _seconds_of_product(x: Tensor, weight: Tensor) -> float:
    begun = time.perf_counter()
    product = F.linear(x, weight)
    # A GPU or MPS is done once a number of the product is here.
    product[0, 0].item()
    return time.perf_counter() - begun


def _remedies(settings: TrainSettings) -> str:
    """Settings that need less memory, as a sentence goes on."""
    smaller = ["a smaller --batch with a larger --accumulate"] if settings.batch > 1 else []
    if not _longnet_of(settings).gradient_checkpointing:
        smaller.append("gradient_checkpointing = true in the file of --config")
    if settings.weights == "float32":
        smaller.append("--weights bfloat16")
    return ", ".join([*smaller, "a shorter --context"]) + ", or a smaller model"


def _length(settings: TrainSettings, seconds: float, steps_done: int, seconds_done: float) -> str:
    """How long the steps that are left take, or how many fit into the minutes that are left."""
    more = " more" if steps_done else ""
    left = math.inf if settings.minutes is None else max(0.0, 60 * settings.minutes - seconds_done)
    if settings.steps is not None and (steps := max(0, settings.steps - steps_done)) * seconds <= left:
        return f"{_counted(steps, f'{more} step')} about {format_seconds(steps * seconds)}"
    return f"about {_counted(math.ceil(left / seconds), f'{more} step')} in {_counted(left / 60, ' minute')}"


def _counted(number: float, what: str) -> str:
    """``1 step``, ``2 steps``."""
    return (f"{number:,}" if isinstance(number, int) else f"{number:,.3g}") + what + ("" if number == 1 else "s")


def _in_words(seconds: float) -> str:
    return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _in_flops(speed: float) -> str:
    return f"{speed / 1e12:,.3g} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:,.3g} GFLOP/s"
