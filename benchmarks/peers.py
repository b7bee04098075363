"""Other implementations, timed beside longnet when the user has a checkout: never part of this repository."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Tensors, draw
from benchmarks.checks import NAMES, Attend, allowed_errors, oracle_out, relative_error, with_gradients
from benchmarks.stand_ins import Modules, lent, torchscale_flash
from benchmarks.timing import Contender, contender
from longnet.gigapath import SlideEncoder
from longnet.gigapath.positions import axis_table, position_embedding

# A peer may round its mixing weights to half precision: allowed errors, in those that longnet is allowed.
_HALF_PRECISION_ALLOWANCE = 3.0

# Beside it q, k, v, projections and results have to fit.
_MOST_INDEX_BYTES = 40 * 2**30

Make = Callable[[Case, Tensors], Contender]


@dataclass(frozen=True)
class Peer:
    """Another implementation: how to run a case with it, or why that cannot be done, and what it gets wrong.

    ``make`` takes q, k, v and the gradient as (B, N, H * D) rows. ``attend`` is its bare function of such q, k, v, where
    it is the function that longnet computes. ``refuses`` says why a case cannot be run, or None. ``remarks`` belong
    beside every figure.
    """

    name: str
    make: Make | None
    why_not: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    refuses: Callable[[Case], str | None] = lambda case: None
    attend: Callable[[Case], Attend] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "why_not": self.why_not, "errors": self.errors, "remarks": list(self.remarks)}


def _imported(name: str, path: Path | None, *modules: str) -> Peer | tuple[list[Any], tuple[str, ...]]:
    """Modules of a checkout, and the packages that were lent to them; or a peer that says why it cannot be run."""
    if path is None:
        return Peer(name, None, f"no checkout given: --{name} PATH")
    try:
        with lent(path) as packages:
            return [importlib.import_module(module) for module in modules], packages
    except ModuleNotFoundError as error:
        return Peer(name, None, f"its import needs the package {error.name}, which is not installed")


def load_torchscale(path: Path | None, case: Case, device: torch.device | str = "cpu") -> Peer:
    """torchscale's ``DilatedAttention`` (the authors' code) from a checkout, with torch's flash kernel lent to it.

    Its forward must be the definition with blocked head offsets; how far its gradients are off is recorded.
    """
    name = "torchscale"
    if path is not None and not (path / "torchscale" / "component" / "dilated_attention.py").is_file():
        return Peer(name, None, f"{path.name} has no torchscale/component/dilated_attention.py")
    parts = ("torchscale.component.dilated_attention", "torchscale.component.multihead_attention")
    imported = _imported(name, path, *parts)
    if isinstance(imported, Peer):
        return imported
    (module, attention), packages = imported
    # On a CPU torchscale looks for no kernel at all.
    if "flash_attn" in packages or attention.flash_attn_func is None:
        attention.flash_attn_func = torchscale_flash

    def attend(case: Case) -> Attend:
        """Its attention module, the projections left out, so that attention alone is compared."""
        lists = {"segment_length": list(case.segment_lengths), "dilated_ratio": list(case.dilation_rates)}
        fixed = {"multiway": False, "xpos_rel_pos": False, "flash_attention": True, "seq_parallel": False}
        settings = Namespace(**fixed, **lists, layernorm_eps=1e-5)
        one = module.DilatedAttention(settings, case.heads * case.head_dim, case.heads, self_attention=True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(one, part, nn.Identity())
        return lambda query, key, value: one(query, key, value, is_causal=case.is_causal)[0]

    def make(case: Case, rows: Tensors) -> Contender:
        return contender(name, attend(case), rows)

    small = case.small(length=max(case.small().segment_lengths))
    tensors = draw(small, device=device)
    got = make(small, tensors.rows()).passes["forward_backward"]()
    expected = with_gradients(lambda q, k, v: oracle_out(small, q, k, v, "blocked"), tensors.double())
    pairs = zip(NAMES, got, expected, strict=True)
    errors = {what: relative_error(one, other.transpose(1, 2).flatten(2)) for what, one, other in pairs}
    factor = 1.0 if case.torch_dtype == torch.float32 else _HALF_PRECISION_ALLOWANCE
    allowed = factor * allowed_errors(tensors, case.is_causal)[0]
    if not errors["out"] <= allowed:
        return Peer(name, None, f"its out is off by {errors['out']:.2g}, allowed {allowed:.2g}", errors)
    listed = ", ".join(f"{what} {error:.2g}" for what, error in errors.items())
    remarks = (f"relative errors in {case.dtype}: {listed}", *_lent_remark(packages, "einops", "flash_attn"))
    return Peer(name, make, None, errors, remarks, attend=attend)


def load_dilated_attention_pytorch(path: Path | None) -> Peer:
    """fkodom's ``DilatedAttention``: every head attends in one branch only, so it is timed, not checked."""
    name = "dilated-attention-pytorch"
    imported = _imported(name, path, "dilated_attention_pytorch.dilated_attention")
    if isinstance(imported, Peer):
        return imported
    (module,), packages = imported

    def make(case: Case, rows: Tensors) -> Contender:
        attend = partial(module.DilatedAttention(case.segment_lengths, case.dilation_rates), is_causal=case.is_causal)
        return contender(name, attend, rows.view(case.batch, case.length, case.heads, case.head_dim))

    remark = "computes another function: each head attends in one branch only, outputs are divided by their own sum"
    return Peer(name, make, None, {}, (remark, *_lent_remark(packages, "einops", "xformers")), _whole_segments)


def load_alexisrozhkov(path: Path | None) -> Peer:
    """alexisrozhkov's ``MultiheadDilatedSelfAttention``: a causal module whose projections cannot be left out."""
    name = "alexisrozhkov"
    upstream = _imported(name, path, "dilated_self_attention.multihead_dilated_self_attention")
    if isinstance(upstream, Peer):
        return upstream
    (loaded,), packages = upstream

    def make(case: Case, rows: Tensors) -> Contender:
        width = case.heads * case.head_dim
        module = loaded.MultiheadDilatedSelfAttention(
            list(case.segment_lengths), list(case.dilation_rates), width, case.heads, flash=True
        ).to(rows.query.device)
        module.requires_grad_(False)
        module.o_proj = nn.Identity()
        x, grad_out = rows.query.float(), rows.grad_out.float()
        leaf = x.detach().requires_grad_()

        def run(x: Tensor) -> Tensor:
            # It imports flash-attn when it is called.
            with lent():
                out: Tensor = module(x)
            return out

        def forward_backward() -> tuple[Tensor, ...]:
            out = run(leaf)
            return (out, *torch.autograd.grad(out, (leaf,), grad_out))

        return Contender(name, {"forward": lambda: (run(x),), "forward_backward": forward_backward})

    def refuses(case: Case) -> str | None:
        if not case.is_causal:
            return "it is causal only"
        if len({w // r for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True)}) > 1:
            return "it needs one and the same w / r in every branch"
        # An int64 index for every channel of every selected row, of every head, cached between calls.
        index = sum(case.length // r for r in case.dilation_rates) * case.heads**2 * case.head_dim * 8
        if index > _MOST_INDEX_BYTES:
            return f"its gather indices alone take {index / 2**30:.0f} GiB"
        return _whole_segments(case)

    remark = "a causal module with its q, k, v projections, in float32 around float16 attention"
    return Peer(name, make, None, {}, (remark, *_lent_remark(packages, "einops", "flash_attn")), refuses)


def _whole_segments(case: Case) -> str | None:
    if any(case.length % w for w in case.segment_lengths):
        return "it needs lengths that every segment divides"
    return None


def _lent_remark(missing: tuple[str, ...], *used: str) -> tuple[str, ...]:
    names = [name for name in used if name in missing]
    return (f"torch's own operations stand in for {' and '.join(names)}",) if names else ()


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """timm's: leaves out a sample's residual branch."""
    if drop_prob == 0.0 or not training:
        return x
    kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - drop_prob)
    return x * kept.div_(1 - drop_prob)


def _itself(x: Any, *_: Any, **__: Any) -> Any:
    return x


_GIGAPATH_NEEDS: Modules = {
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {"drop_path": drop_path},
    "timm.models.registry": {"register_model": _itself},
    "fairscale": {},
    "fairscale.nn": {"checkpoint_wrapper": _itself, "wrap": _itself},
    "huggingface_hub": {},
}


def load_gigapath(
    gigapath: Path, torchscale: Path | None, like: SlideEncoder, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Prov-GigaPath's own 12-layer slide encoder with the weights of ``like``, in evaluation mode, and remarks.

    Args:
        gigapath: a checkout of prov-gigapath.
        torchscale: a checkout whose torchscale is used instead of the one that prov-gigapath brings along.

    Raises:
        ModuleNotFoundError: it needs a package that is not there and is not lent. KeyError, RuntimeError: weights that differ.
    """
    paths = [path for path in (torchscale, gigapath, gigapath / "gigapath") if path is not None]
    # Versions of timm differ in what they still have, and nothing of it matters to the result.
    with lent(*paths, more=_GIGAPATH_NEEDS, always=("timm", "fairscale")) as missing:
        encoder = importlib.import_module("gigapath.slide_encoder")
        attention = importlib.import_module("torchscale.component.multihead_attention")
    if "flash_attn" in missing or attention.flash_attn_func is None:
        attention.flash_attn_func = torchscale_flash  # type: ignore[attr-defined]
    vit = encoder.LongNetViT
    lengths = list(like.config.segment_lengths)
    # Its own text of the lengths cannot be parsed with numpy 2, and its table of positions takes minutes on a CPU.
    vit.get_optimal_segment_length = lambda *_: str(lengths)
    vit.initialize_vit_weights = lambda self: None
    with torch.device("meta"):
        model = vit(
            embed_dim=like.config.dim, depth=like.config.layers, norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6)
        )
    model = model.to_empty(device=device).eval()
    model.load_state_dict(like.upstream_state_dict())
    grid = like.slide_ngrids
    cell = torch.cartesian_prod(torch.arange(grid, device=device), torch.arange(grid, device=device))
    table = axis_table(grid, like.config.dim // 2, torch.float32, device)
    model.pos_embed[0, 0] = 0
    for part, place in zip(cell.split(1 << 17), model.pos_embed[0, 1:].split(1 << 17), strict=True):
        place.copy_(position_embedding(part, table))
    remarks = [f"torch's own operations stand in for {', '.join(missing)}"] if missing else []
    return model, [*remarks, "its table of positions is filled on the device"]
