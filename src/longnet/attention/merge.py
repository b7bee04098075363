"""Mixing branches by their softmax denominators, and the rule that makes its gradient exact.

Source: LongNet, arXiv 2307.02486, equations 10 and 11. A branch that attended with log-denominator ``lse_i`` weighs
``softmax_i(lse_i)``; the mixture is then one softmax over the multiset union of all branches' keys.

The gradient rule: with the *merged* ``out`` and the *merged* ``lse`` (not the branch's own), a flash attention backward
recomputes each probability as ``exp(score - lse)``, which is the joint softmax's own, and subtracts
``sum(grad_out * out)``, which is the joint softmax's own too. So running every branch's ordinary backward with the
merged pair and adding up gives the exact joint gradient, and no gradient has to flow through the mixing weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, branch_out: Tensor, branch_lse: Tensor) -> None:
    """Mix one more branch into a running result, in place.

    Args:
        out: (..., D) the mixture so far; may be a strided view. Between branches it is rounded to its own dtype, the
            arithmetic is that of ``lse``.
        lse: (...) its log-denominator, ``-inf`` where nothing has attended yet; float32, or float64 for float64.
        branch_out: (..., D) the branch's own normalised output, any floating dtype.
        branch_lse: (...) the branch's log-denominator, ``-inf`` for a row without keys.
    """
    # exp(branch_lse - merged), in one step; -inf on both sides (a row that nothing has reached yet) gives weight 0.
    weight = torch.sub(branch_lse, lse).sigmoid_().nan_to_num_(0.0)
    mixed = out.to(lse.dtype)
    mixed.lerp_(branch_out.to(lse.dtype), weight.unsqueeze(-1))
    if mixed is not out:
        out.copy_(mixed)
    # On contiguous copies: the strided kernel is not vectorised.
    lse.copy_(torch.logaddexp(lse.contiguous(), branch_lse.contiguous()))


def lse_for_backward(lse: Tensor) -> Tensor:
    """The merged log-denominator in the form a flash backward can take: rows without keys get 0.

    Their scores are all ``-inf``, so ``exp(score - 0) = 0`` gives the zero gradients they must have, where
    ``exp(-inf - -inf)`` would be NaN.
    """
    return lse.masked_fill(lse == -torch.inf, 0.0)


def rows_for_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The merged (query, out, lse) as a flash backward takes them: see :func:`lse_for_backward`, and dead rows get zeros.

    A row is dead if its gradients are zero. It contributes exact zeros then, but 0 * NaN is NaN, and the query of a token
    that is padding may be anything. So it gets query 0, out 0 and lse inf, which make every probability 0.

    Args:
        grad_out, query, out: (..., D).
        grad_lse: (...) or None.
        lse: (...).
    """
    # NaN is not zero here. Several times as fast as any().
    dead = grad_out.abs().amax(-1) == 0
    if grad_lse is not None:
        dead &= grad_lse == 0
    lse = lse_for_backward(lse)
    # The usual case. On other devices the question would wait for them.
    if dead.device.type == "cpu" and not dead.any():
        return query, out, lse
    rows = dead.unsqueeze(-1)
    return query.masked_fill(rows, 0.0), out.masked_fill(rows, 0.0), lse.masked_fill(dead, torch.inf)


def fold_lse_gradient(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hand a gradient of the log-denominator to a flash backward that has no argument for it.

    With probabilities P the score gradient is ``P * (grad_out @ V^T - sum(grad_out * out) + grad_lse)``. One more
    channel that holds 1 in ``grad_out``, ``-grad_lse`` in ``out`` and 0 in q, k and v changes exactly the middle term.
    Eight channels are added, seven of them zero, to keep rows aligned; the caller drops them from the gradients.

    Returns:
        (grad_out, query, key, value, out), each (..., D + 8), contiguous.
    """
    dim = query.shape[-1]

    def rows(x: Tensor) -> Tensor:
        # Contiguous whatever the strides: F.pad would give the layout of channels_last, where x can be taken for one.
        padded = x.new_zeros(*x.shape[:-1], dim + 8)
        padded[..., :dim] = x
        return padded

    grad_out, query, key, value, out = rows(grad_out), rows(query), rows(key), rows(value), rows(out)
    grad_out[..., -8] = 1.0
    out[..., -8] = -grad_lse
    return grad_out, query, key, value, out
