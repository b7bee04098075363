"""Structured pruning of attention heads: which ones matter least, and a model without them.

A head's number decides which tokens it selects, so the other heads keep their numbers: ``LongNetConfig.head_numbers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longnet.checks import is_int
from longnet.models import LongNetLM
from longnet.models.base import LongNetBase
from longnet.models.generation import evaluating
from longnet.models.layers import Block
from longnet.models.placement import is_dispatched
from longnet.nn.position import float64_device
from longnet.runtime.torch_internals import parameter_table

Model = TypeVar("Model", bound=LongNetBase)


def head_importance(
    model: LongNetBase, batches: Iterable[Any], *, loss: Callable[[Any, Any], Tensor] | None = None
) -> Tensor:
    """How much the loss depends on every head: the mean over rows of ``|d loss / d gate|`` for a gate of 1 on its output.

    Source: Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), section 4.1; a layer's
    scores are divided by their l2 norm, as there. Gates are before the sub-norm, where pruning makes zeros. The model is in
    evaluation mode during the call, and no parameter gets a gradient.

    Args:
        model: a LongNetLM, or a LongNetEncoder together with a ``loss``.
        batches: inputs of the loss; at least one.
        loss: ``loss(model, batch)``, the sum over rows of their losses, a scalar. Default: a batch is (B, N + 1) int64 token ids,
            and a row's loss the mean over its N next tokens.

    Returns:
        (layers, H) float64 on the CPU; NaN for heads that are pruned already.

    Raises:
        TypeError: a model of another kind. ValueError: no batch, an encoder without a loss, a loss of another shape.
    """
    _check_model(model)
    if loss is None:
        if not isinstance(model, LongNetLM):
            raise ValueError("loss=None for an encoder: expected loss(model, batch), the sum over rows of their losses")
        loss = _next_token_loss
    blocks = _blocks(model)
    totals = [torch.zeros(block.attention.heads, dtype=torch.float64) for block in blocks]
    rows = 0
    for batch in batches:
        gates: dict[int, Tensor] = {}
        with ExitStack() as contexts, evaluating(model), torch.enable_grad():
            for layer, block in enumerate(blocks):
                contexts.enter_context(_gated(block, gates, layer))
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(
                    f"loss(model, batch) gave {getattr(value, 'shape', value)!r}: expected a scalar tensor"
                )
            grads = torch.autograd.grad(value, [gates[layer] for layer in range(len(blocks))])
        for total, grad in zip(totals, grads, strict=True):
            total += grad.abs().sum(0).flatten().cpu()
        rows += grads[0].shape[0]
    if not rows:
        raise ValueError("batches holds nothing: expected at least one batch")
    scores = torch.full((model.config.layers, model.config.heads), torch.nan, dtype=torch.float64)
    for layer, total in enumerate(totals):
        scores[layer, list(_present(model, layer))] = total / total.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return scores


def least_important(model: LongNetBase, scores: Tensor, fraction: float) -> dict[int, list[int]]:
    """The least important heads, by layer, as :func:`prune_heads` takes them.

    With grouped-query attention a key/value head goes with all its query heads, whose scores are added up. Every layer keeps at
    least one. The number of heads is rounded down.

    Args:
        scores: (layers, H), for example of :func:`head_importance`.
        fraction: share of the present heads to prune, in (0, 1).

    Raises:
        ValueError: scores of another shape, a fraction out of range or so large that a layer would lose all its heads.
    """
    _check_model(model)
    config = model.config
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (config.layers, config.heads):
        shape = tuple(getattr(scores, "shape", ()))
        raise ValueError(f"scores has shape {shape}: expected (layers, H) = {(config.layers, config.heads)}")
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction={fraction}: expected a share of the heads, above 0 and below 1")
    size = config.heads // (config.kv_heads or config.heads)
    groups = [
        (float(scores[layer, list(heads[first : first + size])].sum()), layer, heads[first : first + size])
        for layer in range(config.layers)
        for heads in [_present(model, layer)]
        for first in range(0, len(heads), size)
    ]
    remaining = int(fraction * len(groups) + 1e-9)
    left = [len(_present(model, layer)) // size for layer in range(config.layers)]
    chosen: dict[int, list[int]] = {}
    for _, layer, heads in sorted(groups):
        if remaining and left[layer] > 1:
            chosen.setdefault(layer, []).extend(heads)
            left[layer] -= 1
            remaining -= 1
    if remaining:
        raise ValueError(f"fraction={fraction} would leave a layer without heads: expected less")
    return {layer: sorted(heads) for layer, heads in sorted(chosen.items())}


@torch.no_grad()
def prune_heads(model: Model, heads: Mapping[int, Sequence[int]]) -> Model:
    """A copy of the model without these heads; the model itself stays as it is.

    The copy is exact: it gives what the model gives when the attention outputs of these heads are zero. The sub-norm still takes
    its statistics over all channels, those of pruned heads as zeros. The projections shrink. The other heads keep their numbers
    and so their offsets; ``config.head_numbers`` lists them. The copy saves, loads, generates and streams like any other model.
    Heads can be pruned again later, always by their first numbers.

    Args:
        heads: by layer, the numbers of the heads to remove. Grouped-query heads go together with their key/value head.

    Raises:
        TypeError: a model of another kind, or numbers that are no ints. ValueError: a layer or head that is not there, a layer
            left without heads, part of a key/value head's group, batch norm, a model that is quantised, parallelized or
            whose projections are not plain ``nn.Linear`` layers.
    """
    _check_model(model)
    config = model.config
    heads_left = [_present(model, layer) for layer in range(config.layers)]
    for layer, numbers in heads.items():
        if not is_int(layer) or not 0 <= layer < config.layers:
            raise ValueError(f"heads holds layer {layer!r}: expected 0 to {config.layers - 1}")
        for number in numbers:
            if not is_int(number):
                raise TypeError(f"heads[{layer}] holds {number!r} of type {type(number).__name__}: expected ints")
            if number not in heads_left[layer]:
                raise ValueError(
                    f"heads[{layer}] holds head {number}: expected one of the layer's heads, {heads_left[layer]}"
                )
        if len(set(numbers)) == len(heads_left[layer]):
            raise ValueError(
                f"heads[{layer}]={list(numbers)} are all heads of the layer: expected to leave at least one"
            )
        heads_left[layer] = tuple(number for number in heads_left[layer] if number not in set(numbers))
    smaller = config.replace(head_numbers=tuple(heads_left))
    _check_plain(model)
    state = dict(model.state_dict())
    for layer, numbers in heads.items():
        if numbers:
            _cut_layer(state, f"blocks.{layer}.attention.", _present(model, layer), heads_left[layer], model)
    weight = model.embedding.weight
    with torch.random.fork_rng(devices=[]):  # Its initial weights are overwritten: leave the caller's generator alone.
        pruned = type(model)(smaller, dtype=weight.dtype).to(weight.device)
    pruned.load_state_dict(state)
    pruned.gradient_checkpointing = model.gradient_checkpointing
    return pruned.train(model.training)


def _cut_layer(
    state: dict[str, Tensor], prefix: str, present: tuple[int, ...], heads_left: tuple[int, ...], model: LongNetBase
) -> None:
    """Remove the channels of pruned heads from a layer's entries of ``state``."""
    config = model.config
    dim, group = config.head_dim, config.heads // (config.kv_heads or config.heads)
    places = [present.index(number) for number in heads_left]
    pruned_places = [place for place, number in enumerate(present) if number not in heads_left]
    device = model.embedding.weight.device
    channels, pruned_channels = _channels(places, dim, device), _channels(pruned_places, dim, device)
    kv_channels = _channels([place // group for place in places[::group]], dim, device)

    def select(name: str, index: Tensor, axis: int = 0) -> None:
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].index_select(axis, index)

    def exact(x: Tensor) -> Tensor:
        return x.to(float64_device(device)).double()

    out_weight = exact(state[prefix + "out_proj.weight"][:, pruned_channels])
    if config.norm == "layer":
        # The norm turns the zeros of those channels into one number a token times its weight, plus its bias.
        norm = [exact(state[prefix + f"sub_norm.{name}"][pruned_channels]) for name in ("weight", "bias")]
        added = torch.stack([out_weight @ one for one in norm])
        before = state.get(prefix + "absent")
        added = added if before is None else added + exact(before)
        state[prefix + "absent"] = added.to(state[prefix + "out_proj.weight"].dtype).to(device)
    for name in ("q_proj.weight", "q_proj.bias", "sub_norm.weight", "sub_norm.bias"):
        select(name, channels)
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        select(name, kv_channels)
    select("out_proj.weight", channels, 1)
    select("rel_pos_bias.weight", torch.tensor(places, device=device), 1)


def _channels(heads: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """The channels of these heads, (heads * dim,) int64."""
    return (torch.tensor(heads, device=device)[:, None] * dim + torch.arange(dim, device=device)).flatten()


def _blocks(model: LongNetBase) -> list[Block]:
    return list(model.blocks)  # type: ignore[arg-type]


def _present(model: LongNetBase, layer: int) -> tuple[int, ...]:
    return model.config.layer_head_numbers(layer) or tuple(range(model.config.heads))


def _next_token_loss(model: Any, tokens: Any) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise ValueError(f"a batch is {getattr(tokens, 'shape', type(tokens).__name__)}: expected (B, N + 1) token ids")
    return model.loss(tokens[:, :-1], tokens[:, 1:], reduction="none").mean(1).sum()


def _gated(block: Block, gates: dict[int, Tensor], layer: int) -> Any:
    """A hook, to be removed by leaving it as a context, that multiplies a layer's attention output by its gates."""
    attention = block.attention

    def gate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        out, *rest = inputs  # (B, N, heads * D)
        if layer not in gates:
            gates[layer] = out.new_ones(out.shape[0], 1, attention.heads, 1).requires_grad_()
        return ((out.unflatten(-1, (attention.heads, -1)) * gates[layer]).flatten(-2), *rest)

    return (attention.sub_norm or attention.dropout).register_forward_pre_hook(gate)


def _check_model(model: LongNetBase) -> None:
    if not isinstance(model, LongNetBase):
        raise TypeError(f"model has type {type(model).__name__}: expected a LongNetLM or a LongNetEncoder")


def _check_plain(model: LongNetBase) -> None:
    """Refuse models that a state dict does not describe in full, and projections that cannot be cut."""
    table = model.embedding
    if (
        type(table) is not nn.Embedding
        or len({weight.device for weight in model.parameters()}) > 1
        or is_dispatched(table)
    ):
        raise ValueError(
            f"model has a {type(table).__name__} for an embedding, or weights on several devices or on disk: expected a plain "
            "nn.Embedding and one device; prune heads before quantising and before dispatching with a device_map"
        )
    for layer, block in enumerate(_blocks(model)):
        attention = block.attention
        if model.loss_group is not None or attention.distributed is not False:
            raise ValueError("model is parallelized: expected to prune heads before parallelize")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = getattr(attention, name)
            plain = type(linear) is nn.Linear and isinstance(parameter_table(linear).get("weight"), nn.Parameter)
            if not plain or type(linear.weight) is not nn.Parameter:
                raise ValueError(
                    f"blocks.{layer}.attention.{name} is {type(linear).__name__} with a {type(linear.weight).__name__}: "
                    "expected a plain nn.Linear; prune heads before quantising and before adapters, and make other pruning "
                    "permanent first (torch.nn.utils.prune.remove)"
                )
