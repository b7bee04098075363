"""One long sequence, or several, trained over many devices.

Attention itself is exact over shards with ``DilatedAttention(distributed=...)`` or ``dilated_attention(group=...)``; here is
what a model and its data need around that: sequences cut and joined, and :func:`parallelize`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from longnet.attention import DilatedAttention
from longnet.attention.sharding import lengths_of, peers_of
from longnet.models.base import LongNetBase
from longnet.models.layers import Block
from longnet.nn.norm import BatchNorm
from longnet.runtime.torch_internals import any_batch_norm, flattened_mesh

__all__ = ["parallelize", "shard_lengths", "shard_sequence", "unshard_sequence"]

# The mesh axes that parallelize knows: replicas of the model on other sequences, and shards of one sequence.
_AXES = ("dp", "cp")

# Bytes of weights that are gathered as one: every gather takes time of the host and of the network, however little it sends.
GATHERED_AS_ONE = 1 << 29


def shard_lengths(length: int, ranks: int, multiple_of: int = 1) -> tuple[int, ...]:
    """How many of ``length`` tokens each of ``ranks`` gets: contiguous shards as equal as can be, in rank order.

    Args:
        multiple_of: where shards begin. Shards that begin at multiples of the dilation rates are fastest: give the largest rate.

    Raises:
        ValueError: a number that is not positive (``length`` may be 0).
    """
    if length < 0 or ranks < 1 or multiple_of < 1:
        raise ValueError(f"length={length}, ranks={ranks}, multiple_of={multiple_of}: expected at least 0, 1 and 1")
    units = -(-length // multiple_of)
    bounds = [min(length, units * rank // ranks * multiple_of) for rank in range(ranks + 1)]
    return tuple(high - low for low, high in pairwise(bounds))


def shard_sequence(
    x: Tensor, group: Any, dim: int = 1, *, lengths: Sequence[int] | None = None, multiple_of: int = 1
) -> Tensor:
    """This rank's contiguous shard of ``x``, a view; every rank holds the whole ``x``.

    Targets are shifted before they are cut: a shard's last token predicts the next shard's first one.

    Args:
        group: the ranks that share the sequence, a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension.
        dim: the axis of tokens.
        lengths: tokens of every rank's shard, default as :func:`shard_lengths` says, with ``multiple_of``.

    Raises:
        ValueError: no such axis; lengths that are not one per rank, or do not add up to the sequence.
    """
    peers, length = peers_of(group), _length(x, dim)
    if lengths is None:
        lengths = shard_lengths(length, peers.size, multiple_of)
    if len(lengths) != peers.size or sum(lengths) != length or min(lengths) < 0:
        raise ValueError(
            f"lengths={tuple(lengths)}: expected {peers.size} lengths, one per rank, of {length} tokens together"
        )
    return x.narrow(dim, sum(lengths[: peers.rank]), lengths[peers.rank])


def unshard_sequence(x: Tensor, group: Any, dim: int = 1) -> Tensor:
    """The whole sequence from every rank's shard, on every rank. Shards may differ in length; all ranks call.

    Differentiable: a shard's gradient is the sum over the ranks of what they did with it.

    Raises:
        ValueError: no such axis.
    """
    peers, length = peers_of(group), _length(x, dim)
    if peers.size == 1:
        return x
    lengths = lengths_of(peers, length).lengths
    return _Unshard.apply(x, peers.group, peers.rank, lengths, dim)


def _length(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} of a tensor of shape {tuple(x.shape)}: expected its axis of tokens")
    return x.shape[dim]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rank: int, lengths: tuple[int, ...], dim: int) -> Tensor:
        ctx.place = (group, rank, lengths, dim)
        rows = x.movedim(dim, 0)
        # Collectives need parts of equal size.
        own = rows.new_zeros(max(lengths), *rows.shape[1:])
        own[: lengths[rank]] = rows
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own, group=group)
        whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        group, rank, lengths, dim = ctx.place
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=group)
        return grad.narrow(dim, sum(lengths[:rank]), lengths[rank]), None, None, None, None


def parallelize(model: LongNetBase, mesh: DeviceMesh, **fsdp: Any) -> LongNetBase:
    """Train ``model`` over a mesh, in place: sequences sharded over its axis ``cp``, replicas over ``dp``, FSDP2 over both.

    Every rank then passes its shard of tokens (:func:`shard_sequence`) and gets its shard's result; ``LongNetLM.loss`` with
    the reduction ``"mean"`` is the mean over all positions of all ranks, and gradients are those of one device on the whole
    batch. Make the optimizer afterwards: parameters become ``DTensor``.

    Args:
        model: with the same weights on every rank, or not yet trained on any: FSDP keeps this rank's part of its own. Weights of
            512 MiB and less are gathered together, in the forward and in the backward pass; those of a larger
            model block by block.
        mesh: of the axes ``dp`` and ``cp``, or one of them.
        fsdp: for ``torch.distributed.fsdp.fully_shard`` (``mp_policy``, ``offload_policy``, ``reshard_after_forward``).

    Returns:
        The model.

    Raises:
        TypeError: not a LongNet, or not a mesh. ValueError: other axes, a model that is sharded already, or one with batch
            normalisation, whose statistics would be those of a shard.
    """
    if not isinstance(model, LongNetBase):
        raise TypeError(f"model has type {type(model).__name__}: expected a LongNetLM or a LongNetEncoder")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh has type {type(mesh).__name__}: expected a torch.distributed DeviceMesh")
    names = mesh.mesh_dim_names or ()
    if not names or any(name not in _AXES for name in names):
        raise ValueError(f"mesh has the axes {names}: expected 'dp' and 'cp', or one of them")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model is sharded already: expected one that neither parallelize nor fully_shard was given")
    if "cp" in names and mesh["cp"].size() > 1:
        # Check everything before changing anything.
        for name, module in model.named_modules():
            if isinstance(module, BatchNorm | any_batch_norm()):
                raise ValueError(
                    f"{name} is a batch normalisation: its statistics would be those of one shard, expected config.norm "
                    "'layer' or 'rms' for a sequence over several ranks"
                )
        for module in model.modules():
            if isinstance(module, DilatedAttention):
                module.distributed = mesh["cp"]
    flat = mesh if len(names) == 1 else flattened_mesh(mesh, "dp_cp")
    model.loss_group = flat.get_group()
    shard_weights(model, [module for module in model.modules() if isinstance(module, Block)], flat, **fsdp)
    for name in ("loss", "hidden", "logits"):
        if hasattr(model, name):
            # Entered from outside like forward, so weights have to be gathered for them too.
            dist.fsdp.register_fsdp_forward_method(model, name)
    return model


def shard_weights(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, **fsdp: Any) -> None:
    """FSDP2 over a mesh of one dimension, in place: of a large model each of ``blocks`` for itself, then all that is left."""
    is_small = sum(weight.nbytes for weight in model.parameters()) <= GATHERED_AS_ONE
    # By default FSDP2 leaves the root's weights gathered after a forward pass: an optimizer that is made then would hold the
    # gathered copies, and train nothing.
    options = {"reshard_after_forward": True, **fsdp}
    for module in (*(() if is_small else blocks), model):
        fully_shard(module, mesh=mesh, **options)
