"""AdamW, or Muon beside it: which weight is trained by which, as torch does by hand, at which rate, and never by half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from longnet.models import LongNetConfig, LongNetLM
from longnet.training import CheckpointError, TrainSettings, muon, train
from longnet.training.checkpoint import Checkpoint
from longnet.training.metrics import read_metrics
from longnet.training.optimizer import make_optimizer, state_shapes
from longnet.training.settings import OPTIMIZERS
from longnet.training.state import collect_state, restore_state

CPU = torch.device("cpu")
Make = Callable[..., TrainSettings]

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "relative bias": {"use_rel_pos_bias": True},
    "norms of queries and keys": {"qk_norm": True, "norm": "rms", "bias": False},
    "grouped": {"kv_heads": 1, "layer_types": ["sliding_attention", "strided_attention"], "sliding_window": 5},
    "pruned": {"head_numbers": [[0, 1], [1]]},
}
PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")
MATRICES = [
    f"blocks.{layer}.{name}.weight"
    for layer in range(2)
    for name in (*PROJECTIONS, "feed_forward.fc1", "feed_forward.fc2")
]


def _model(settings: TrainSettings, **options: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(settings.model, **options)


def _settings(make: Make, model: str = "tied", **changes: Any) -> TrainSettings:
    config = LongNetConfig.from_dict({**make().model.to_dict(), "layers": 2, **MODELS[model]})
    return make(**{"model": config, "optimizer": "muon", **changes})


def _give_gradients(model: LongNetLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)


@pytest.mark.parametrize("model", MODELS)
def test_muon_trains_the_blocks_matrices_and_adamw_the_rest(make_settings: Make, model: str) -> None:
    settings = _settings(make_settings, model, weight_decay=0.3, lr=0.01, matrix_lr=0.02)
    made = _model(settings)
    name_of = {weight: name for name, weight in made.named_parameters()}
    muon: list[str] = []
    adamw: list[str] = []
    for group in make_optimizer(made, settings).param_groups:
        names = [name_of[weight] for weight in group["params"]]
        muon += names if "momentum" in group else []
        adamw += names if "betas" in group else []
        assert group["lr"] == (0.02 if "momentum" in group else 0.01)
        for weight in group["params"]:
            assert group["weight_decay"] == (0.3 if weight.ndim >= 2 else 0.0)
    assert sorted(muon) == sorted(MATRICES)
    assert sorted(muon + adamw) == sorted(name_of.values())


def test_adamw_alone_decays_matrices_only(make_settings: Make) -> None:
    settings = make_settings(weight_decay=0.3)
    model = LongNetLM(settings.model)
    groups = make_optimizer(model, settings).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(weight.ndim >= 2 for weight in groups[0]["params"])
    assert all(weight.ndim < 2 for weight in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps (Muon's post, and torch.optim.Muon) in the dtype of x: singular values move towards 1."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("model", MODELS)
def test_steps_are_those_of_muon_and_torchs_adamw(make_settings: Make, model: str) -> None:
    settings = _settings(make_settings, model, weight_decay=0.3, lr=0.01, beta1=0.8, beta2=0.9)
    ours, theirs = (_model(settings, dtype=torch.float64) for _ in range(2))
    optimizer = make_optimizer(ours, settings)
    weights = dict(theirs.named_parameters())
    rest = {name: weight for name, weight in weights.items() if name not in MATRICES}
    by_hand = [
        torch.optim.AdamW(
            [one for one in rest.values() if wanted(one)], 0.01, (0.8, 0.9), weight_decay=decay, fused=True
        )
        for wanted, decay in ((lambda one: one.ndim >= 2, 0.3), (lambda one: one.ndim < 2, 0.0))
    ]
    momenta = {name: torch.zeros_like(weights[name]) for name in MATRICES}
    for seed in range(3):
        for one in (ours, theirs):
            _give_gradients(one, seed)
        optimizer.step()
        for part in by_hand:
            part.step()
        with torch.no_grad():
            for name, momentum in momenta.items():
                weight = weights[name]
                assert weight.grad is not None
                momentum += 0.05 * (weight.grad - momentum)
                ahead = weight.grad + 0.95 * (momentum - weight.grad)
                weight *= 1 - 0.03 * 0.3
                weight -= 0.03 * 0.2 * max(weight.shape) ** 0.5 * _orthogonal(ahead)
    for name, weight in ours.named_parameters():
        limit = 1e-5 if name in momenta else 0.0
        torch.testing.assert_close(weight, weights[name], rtol=limit, atol=limit, msg=name)


class _Products(TorchDispatchMode):
    """Notes the dtypes of matrix products, and how many matrices each has."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.batches: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.dtypes.add(args[0].dtype)
            self.batches.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_muon_multiplies_no_bfloat16_on_a_cpu(make_settings: Make, weights: str) -> None:
    """A CPU without instructions for it takes far longer than for float32."""
    settings = _settings(make_settings, weights=weights, dtype=weights)
    model = _model(settings, dtype=getattr(torch, weights))
    optimizer = make_optimizer(model, settings)
    _give_gradients(model, 0)
    with _Products() as products:
        optimizer.step()
    assert products.dtypes == {torch.float32}


def test_batches_of_any_size_step_alike(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch holds matrices of one shape and a limited number of them; those without a gradient stay as they are."""
    settings = _settings(make_settings, "grouped", lr=0.01)
    found, sizes = [], []
    for numbers in (1, 512, 1 << 24):
        monkeypatch.setattr(muon, "_BATCH", numbers)
        model = _model(settings)
        optimizer = make_optimizer(model, settings)
        _give_gradients(model, 0)
        model.get_parameter(MATRICES[1]).grad = None
        with _Products() as products:
            optimizer.step()
        found.append(dict(model.named_parameters()))
        sizes.append(products.batches)
    # Four matrices of queries and outputs, three of keys and values (one has no gradient), two of each feed-forward layer.
    assert [sorted(one) for one in sizes] == [[1], [1, 2, 3], [2, 3, 4]]
    assert torch.equal(found[0][MATRICES[1]], dict(_model(settings).named_parameters())[MATRICES[1]])
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], weight, rtol=1e-6, atol=1e-6, msg=name)


def test_both_rates_follow_the_schedule(make_settings: Make) -> None:
    settings = make_settings(optimizer="muon", lr=0.01, matrix_lr=0.05, schedule="linear", warmup=4)
    rates: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.Muon):
            rates.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        train(settings)
    finally:
        handle.remove()
    lines = [line for line in read_metrics(Path(settings.out) / "metrics.jsonl") if line["kind"] == "train"]
    assert rates == pytest.approx([5 * line["lr"] for line in lines])
    assert max(rates) < 0.05 and rates[0] == pytest.approx(0.0125) and rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("place", [MATRICES[0], "embedding.weight", "norm.weight"])
def test_a_scaler_skips_the_step_of_all_weights(make_settings: Make, optimizer: str, place: str) -> None:
    settings = _settings(make_settings, optimizer=optimizer)
    model = _model(settings)
    made = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for is_finite in (False, True):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        scaler.scale(torch.zeros(()))
        _give_gradients(model, 0)
        if not is_finite:
            model.get_parameter(place).grad[0] = torch.inf  # type: ignore[index]
        scaler.unscale_(made)
        scaler.step(made)
        scaler.update()
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) != is_finite, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float16_skips_steps_and_is_resumed(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optimizer: str
) -> None:
    """On a CPU that is taken for a device with loss scaling."""
    monkeypatch.setattr("longnet.training.loop.resolve_device", lambda *_: CPU)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    options: dict[str, Any] = {"optimizer": optimizer, "dtype": "float16", "eval_every": 0, "lr": 0.01}
    whole, parts = (make_settings(out=str(tmp_path / name), **options) for name in ("whole", "parts"))
    train(whole)
    asked = iter(range(8))
    train(parts, should_stop=lambda: next(asked) == 7)
    train(parts, resume=True)
    found = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(Path(one.out) / "metrics.jsonl")]
        for one in (whole, parts)
    ]
    assert found[0] == found[1]
    # The first scale is too large; what follows learns.
    assert found[0][0][1] is None and found[0][-1][0] < found[0][0][0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["untied", "pruned"])
def test_a_state_comes_back_and_a_moment_that_lacks_is_named(make_settings: Make, optimizer: str, model: str) -> None:
    settings = _settings(make_settings, model, optimizer=optimizer)
    ours, theirs = (_model(settings) for _ in range(2))
    first, second = make_optimizer(ours, settings), make_optimizer(theirs, settings)
    _give_gradients(ours, 0)
    first.step()
    tensors = {name: tensor.clone() for name, tensor in collect_state(ours, first, CPU).items()}
    found = Checkpoint(Path("state"), tensors, {})
    moment = "momentum_buffer" if optimizer == "muon" else "exp_avg_sq"
    name = f"optimizer.{MATRICES[0]}.{moment}"
    for message, damaged in (
        ("missing", {one: tensor for one, tensor in tensors.items() if one != name}),
        (r"\(3,\)", {**tensors, name: torch.zeros(3)}),
    ):
        with pytest.raises(CheckpointError, match=rf"{MATRICES[0]}\.{moment} is {message}, expected \("):
            restore_state(replace(found, tensors=damaged), theirs, second, CPU)
    restore_state(found, theirs, second, CPU)
    for one, made in ((ours, first), (theirs, second)):
        _give_gradients(one, 1)
        made.step()
    for key, tensor in collect_state(theirs, second, CPU).items():
        assert torch.equal(tensor, collect_state(ours, first, CPU)[key]), key
    # What is said to be kept is what torch keeps.
    assert {
        weight: {key: value.shape for key, value in kept.items()} for weight, kept in first.state.items()
    } == state_shapes(first)
