"""The registry of what is timed beside longnet: the same-FLOP kernel, dense attention, other implementations."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, Tensors, draw, draw_shape
from benchmarks.checks import Attend, allowed_errors, attend_dilated, oracle_out, relative_error, with_gradients

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Contender:
    """Something to time: ``passes["forward"]()`` gives out, ``passes["forward_backward"]()`` out and gradients."""

    name: str
    passes: dict[str, Callable[[], tuple[Tensor, ...]]]


def contender(name: str, attend: Attend, tensors: Tensors) -> Contender:
    """A differentiable function of q, k, v on given tensors."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors.all[:3])

    def forward() -> tuple[Tensor, ...]:
        return (attend(tensors.query, tensors.key, tensors.value),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, tensors.grad_out))

    return Contender(name, {"forward": forward, "forward_backward": forward_backward})


def ours(case: Case, tensors: Tensors, name: str = "ours") -> Contender:
    """``longnet.dilated_attention``, through autograd."""
    return contender(name, attend_dilated(case), tensors)


def same_flop(case: Case) -> Contender:
    """torch's CPU flash kernel, called bare, on dense (blocks, H, block, D): scale its time by ``case.flop_ratio``.

    What dilation would cost if reading strided rows, looping and mixing were free.
    """
    shape = (case.batch * case.blocks, case.heads, case.block, case.head_dim)
    query, key, value, grad_out = draw_shape(shape, case.torch_dtype, seed=2).all

    def forward() -> tuple[Tensor, ...]:
        return tuple(_flash(query, key, value, 0.0, case.is_causal))

    def forward_backward() -> tuple[Tensor, ...]:
        out, lse = _flash(query, key, value, 0.0, case.is_causal)
        return (out, *_flash_backward(grad_out, query, key, value, out, lse, 0.0, case.is_causal))

    return Contender("same_flop", {"forward": forward, "forward_backward": forward_backward})


def dense(case: Case, tensors: Tensors) -> Contender:
    """``F.scaled_dot_product_attention`` over the whole sequence: quadratic, and another function."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return contender("dense", attend, tensors)


@dataclass(frozen=True)
class Peer:
    """Another implementation: how to run a case with it, or why that cannot be done, and what it gets wrong."""

    name: str
    make: Callable[[Case, Tensors], Contender] | None
    why_not: str | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "why_not": self.why_not, "errors": self.errors}


def load_torchscale(path: Path | None, case: Case) -> Peer:
    """torchscale's ``DilatedAttention`` (the authors' code) from a checkout, with torch's CPU flash kernel lent to it.

    Its forward must be the definition with blocked head offsets; how far its gradients are off is recorded.
    """
    if path is None:
        return Peer("torchscale", None, "no checkout given: --torchscale PATH")
    if not (path / "torchscale" / "component" / "dilated_attention.py").is_file():
        return Peer("torchscale", None, f"{path.name} has no torchscale/component/dilated_attention.py")
    try:
        with _importable(path):
            module = importlib.import_module("torchscale.component.dilated_attention")
            attention = importlib.import_module("torchscale.component.multihead_attention")
    except ModuleNotFoundError as error:
        return Peer("torchscale", None, f"its import needs the package {error.name}, which is not installed")
    attention.flash_attn_func = _lent_flash  # type: ignore[attr-defined]

    def make(case: Case, tensors: Tensors) -> Contender:
        # It takes (B, N, H * D): its projections are left out, so that attention alone is compared.
        rows = Tensors(*(x.transpose(1, 2).flatten(2).contiguous() for x in tensors.all))
        return contender("torchscale", _torchscale_attend(module.DilatedAttention, case), rows)

    small = case.small(length=max(case.small().segment_lengths))
    errors = _peer_errors(make, small)
    allowed = allowed_errors(draw(small), case.is_causal)[0]
    if not errors["out"] <= allowed:
        return Peer("torchscale", None, f"its out is off by {errors['out']:.2g}, allowed {allowed:.2g}", errors)
    return Peer("torchscale", make, None, errors)


def _peer_errors(make: Callable[[Case, Tensors], Contender], small: Case) -> dict[str, float]:
    """Relative errors of a peer's out and gradients against the oracle."""
    tensors = draw(small)
    got = make(small, tensors).passes["forward_backward"]()
    expected = with_gradients(lambda q, k, v: oracle_out(small, q, k, v, "blocked"), tensors.to(torch.float64))
    names = ("out", "grad_query", "grad_key", "grad_value")
    pairs = zip(names, got, expected, strict=True)
    return {name: relative_error(one, other.transpose(1, 2).flatten(2)) for name, one, other in pairs}


def _torchscale_attend(attention: Any, case: Case) -> Attend:
    settings = Namespace(
        multiway=False,
        xpos_rel_pos=False,
        layernorm_eps=1e-5,
        flash_attention=True,
        seq_parallel=False,
        segment_length=list(case.segment_lengths),
        dilated_ratio=list(case.dilation_rates),
    )
    module = attention(settings, case.heads * case.head_dim, case.heads, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, name, nn.Identity())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = module(query, key, value, is_causal=case.is_causal)[0]
        return out

    return attend


def _lent_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """flash-attn's signature on (B, N, H, D), by torch's CPU kernel: out (B, N, H, D) and lse (B, H, N)."""
    if bias is not None or dropout:
        raise ValueError(f"bias={bias} and dropout={dropout}: expected None and 0")
    rows = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = _flash(*rows, 0.0, is_causal, scale=softmax_scale)
    return out.transpose(1, 2), lse


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
