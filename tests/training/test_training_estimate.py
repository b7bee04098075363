"""What is said of a step before a run: the memory that torch then allocates, and the FLOPs that it then counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from longnet.geometry.cost import score_pairs
from longnet.models import LongNetConfig, LongNetLM
from longnet.training import TrainSettings, estimate, train
from longnet.training.device import autocast
from longnet.training.estimate import describe_step, product_speed, step_flops, step_memory
from longnet.training.optimizer import make_optimizer
from longnet.training.progress import Reporter
from longnet.training.settings import OPTIMIZERS

CPU = torch.device("cpu")
Make = Callable[..., TrainSettings]

TYPES = ("sliding_attention", "strided_attention", "full_attention", "shifted_dilated_attention")
# Preset, changes to it, settings.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nano": ("nano", {}, {"context": 256, "batch": 3}),
    "nano, recomputed": ("nano", {"gradient_checkpointing": True}, {"context": 256, "batch": 3}),
    "nano, longer": ("nano", {}, {"context": 2048, "batch": 1}),
    "nano, bfloat16": ("nano", {"norm": "rms"}, {"context": 512, "dtype": "bfloat16"}),
    "nano, bfloat16 weights": ("nano", {}, {"context": 512, "dtype": "bfloat16", "weights": "bfloat16"}),
    "nano, muon": ("nano", {"tie_embeddings": False}, {"context": 256, "batch": 3, "optimizer": "muon"}),
    "nano, layer types": (
        "nano",
        {"layer_types": TYPES, "layers": 4, "sliding_window": 16, "shift_keys": True, "dropout": 0.1, "kv_heads": 2},
        {"context": 512},
    ),
    "tiny": ("tiny", {}, {"context": 512}),
    "tiny, recomputed": ("tiny", {"gradient_checkpointing": True}, {"context": 512}),
    "tiny, feed-forward in chunks": ("tiny", {"feed_forward_chunk": 64}, {"context": 512}),
    "tiny, both": ("tiny", {"feed_forward_chunk": 64, "gradient_checkpointing": True}, {"context": 512}),
    "small": ("small", {"layers": 2}, {"context": 256}),
}


def _settings(make: Make, run: str) -> TrainSettings:
    preset, changes, settings = RUNS[run]
    return make(**{"model": LongNetConfig.preset(preset, **changes), "batch": 1, **settings})


def _loss(model: LongNetLM, settings: TrainSettings) -> torch.Tensor:
    device = model.embedding.weight.device
    tokens = torch.zeros(settings.batch, settings.context, dtype=torch.int64, device=device)
    with autocast(device, getattr(torch, settings.dtype)):
        return model.loss(tokens, tokens)


def _step(model: LongNetLM, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
    _loss(model, settings).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("run", [name for name in RUNS if not RUNS[name][1].get("gradient_checkpointing")])
def test_activations_are_what_autograd_saves(make_settings: Make, run: str) -> None:
    settings = _settings(make_settings, run)
    model = LongNetLM(settings.model, dtype=getattr(torch, settings.weights))
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
    saved: dict[StorageWeakRef, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved.setdefault(StorageWeakRef(one.untyped_storage()), one), lambda one: one
    ):
        _loss(model, settings)
    count = sum(one.untyped_storage().nbytes() for key, one in saved.items() if key not in weights)
    assert step_memory(settings, CPU).activations == pytest.approx(count, rel=0.15)


@pytest.mark.parametrize("run", RUNS)
def test_the_memory_of_a_step_is_what_torch_allocates(make_settings: Make, tmp_path: Path, run: str) -> None:
    settings = _settings(make_settings, run)
    dtype = getattr(torch, settings.weights)
    model, said = LongNetLM(settings.model, dtype=dtype), step_memory(settings, CPU)
    optimizer = make_optimizer(model, settings)
    _step(model, optimizer, settings)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert said.weights == said.gradients == sum(weight.nbytes for weight in model.parameters())
    assert said.optimizer == sum(moment.nbytes for moment in moments)
    # What the step allocates: not the weights and moments, which are there already.
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        _step(model, optimizer, settings)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    peak = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    # Gradients appear while activations go, so their sum is more; what a function holds while it runs is not counted.
    assert 0.8 * peak < said.gradients + said.activations < 1.25 * peak + said.gradients


def test_kernels_of_a_gpu_save_less(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where norms and projections are one step, no norm is saved, nor GELU.

    Of 8 bytes a channel of the hidden layer 2 are left; of the stream, each of the two norms takes 2 less, the inner one 4.
    """
    settings = _settings(make_settings, "small").replace(dtype="bfloat16")
    plain = step_memory(settings, CPU).activations
    monkeypatch.setattr("longnet.nn.projections.fits", lambda device, dtype, channels: True)
    config = settings.model
    saved = (6 * config.feed_forward_dim + 8 * config.dim) * settings.context * config.layers
    assert plain - step_memory(settings, CPU).activations == pytest.approx(saved, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_memory_of_a_step_is_what_a_gpu_allocates(make_settings: Make, recomputed: bool) -> None:
    device = torch.device("cuda")
    config = LongNetConfig.preset("small", gradient_checkpointing=recomputed)
    settings = make_settings(model=config, context=16384, batch=1, dtype="bfloat16", device="cuda")
    said = step_memory(settings, device).total
    before = torch.cuda.memory_allocated()
    model = LongNetLM(config, device=device)
    optimizer = make_optimizer(model, settings)
    _step(model, optimizer, settings)
    torch.cuda.reset_peak_memory_stats()
    _step(model, optimizer, settings)
    assert said == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.3)


def test_checkpointing_saves_less(make_settings: Make) -> None:
    plain, recomputed = (step_memory(_settings(make_settings, run), CPU) for run in ("tiny", "tiny, recomputed"))
    assert recomputed.activations < 0.5 * plain.activations
    assert recomputed.weights == plain.weights


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_shared_among_processes(make_settings: Make, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(model=LongNetConfig.preset("tiny", layers=8), context=512, batch=4, optimizer=optimizer)
    alone, shared = step_memory(settings, CPU), step_memory(settings, CPU, dp=2, cp=2)
    assert shared.optimizer == alone.optimizer // 4 and shared.gradients == alone.gradients // 4
    # A small model is gathered as one, and its gradients are whole before they are shared.
    assert shared.weights == -(-alone.weights // 4) + 2 * alone.weights
    monkeypatch.setattr(estimate, "GATHERED_AS_ONE", 0)
    assert alone.weights / 4 < step_memory(settings, CPU, dp=2, cp=2).weights < alone.weights
    assert shared.activations == pytest.approx(alone.activations / 4, rel=0.2)


@pytest.mark.parametrize(
    "run", ["tiny", "tiny, recomputed", "tiny, feed-forward in chunks", "tiny, both", "nano, layer types"]
)
def test_flops_are_those_that_torch_counts_and_those_of_the_pairs(make_settings: Make, run: str) -> None:
    settings = _settings(make_settings, run)
    config = settings.model
    model = LongNetLM(config)
    with FlopCounterMode(display=False) as counter:
        _loss(model, settings).backward()
    forward_and_backward = 18 if config.gradient_checkpointing else 14
    pairs = sum(
        score_pairs(layer.pattern, layer.heads, settings.context, True, segment_offset=layer.segment_offset)
        for layer in config.layer_attentions()
    )
    attention = forward_and_backward * config.head_dim * pairs
    products = sum(
        flops
        for name, flops in counter.get_flop_counts()["Global"].items()
        if name in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert step_flops(settings) == pytest.approx(products + attention, rel=0.02)
    more = settings.replace(batch=2, accumulate=3)
    assert step_flops(more) == 6 * step_flops(settings)
    assert step_flops(more, dp=2, cp=3) == step_flops(settings)


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_flops_of_muon_are_those_that_torch_counts(make_settings: Make, model: str) -> None:
    settings = make_settings(model=LongNetConfig.preset(model), batch=4)
    muon = settings.replace(optimizer="muon")
    made = LongNetLM(settings.model)
    optimizer = make_optimizer(made, muon)
    for weight in made.parameters():
        weight.grad = torch.zeros_like(weight)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    for ranks, share in (({}, 1), ({"dp": 2, "cp": 2}, 4)):
        more = step_flops(muon, **ranks) - step_flops(settings, **ranks)
        assert counter.get_total_flops() > 0 and more == pytest.approx(counter.get_total_flops() / share)


def test_the_speed_of_a_product_is_measured_within_a_second(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def took(x: torch.Tensor, weight: torch.Tensor) -> float:
        rows.append(len(x))
        return len(x) * 1e-3

    monkeypatch.setattr(estimate, "_seconds_of_product", took)
    settings = make_settings(context=64, batch=8)
    assert product_speed(settings, CPU) == pytest.approx(2 * 16 * 64 * 1e3)
    # 32 rows take more than 0.02 s.
    assert max(rows) == 32
    assert product_speed(make_settings(context=5, batch=2), CPU) > 0 and rows[-1] == 10


def test_lines_for_a_user(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "product_speed", lambda *_: 5e10)
    monkeypatch.setattr(estimate, "step_flops", lambda *_, **__: 4 * 10**10)
    monkeypatch.setattr(estimate, "free_memory", lambda _: 1 << 40)
    settings = make_settings(context=256, steps=90)
    memory, spent = describe_step(settings, CPU)
    assert memory.startswith("Memory of a step: about ") and "activations (what the forward pass saves" in memory
    assert spent == (
        "Time of a step: about 2.3 s, 90 steps about 3:26. A matrix product reaches 50 GFLOP/s here, and a step is assumed to "
        "reach 35% of that"
    )
    assert "about 27 steps in 1 minute. A" in describe_step(settings.replace(minutes=1.0), CPU)[-1]
    # A run that is resumed.
    assert ", 30 more steps about 1:09. A" in describe_step(settings, CPU, steps_done=60, seconds_done=99.0)[-1]
    assert ", 1 more step about 0:02. A" in describe_step(settings, CPU, steps_done=89)[-1]
    resumed = describe_step(settings.replace(minutes=1.5), CPU, steps_done=20, seconds_done=60.0)[-1]
    assert ", about 14 more steps in 0.5 minutes. A" in resumed
    assert "Memory of a step in each process: " in describe_step(settings, CPU, dp=2)[0]


def test_too_little_memory_is_said_with_what_helps(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "product_speed", lambda *_: 5e10)
    monkeypatch.setattr(estimate, "free_memory", lambda _: 3 << 10)
    _, warned, _ = describe_step(make_settings(), CPU)
    assert warned == (
        "That is more than the 3.0 KiB that cpu has. If memory runs out, try a smaller --batch with a larger --accumulate, "
        "gradient_checkpointing = true in the file of --config, --weights bfloat16, a shorter --context, or a smaller model"
    )
    model = make_settings().model.replace(gradient_checkpointing=True)
    _, warned, _ = describe_step(make_settings(model=model, batch=1, dtype="bfloat16", weights="bfloat16"), CPU)
    assert warned.endswith("try a shorter --context, or a smaller model")
    monkeypatch.setattr(estimate, "free_memory", lambda _: None)
    assert len(describe_step(make_settings(), CPU)) == 2


def test_a_run_says_it_before_its_model_and_goes_on_without(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listener(Reporter):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    heard, again = Listener(), Listener()
    one = train(make_settings(steps=2, eval_every=0), reporter=heard)
    starts = [line.split(":")[0] for line in heard.lines]
    assert starts.index("Memory of a step") + 2 == starts.index("Model")

    def fail(*_: Any, **__: Any) -> list[str]:
        raise torch.OutOfMemoryError("no memory\nmore")

    monkeypatch.setattr("longnet.training.loop.describe_step", fail)
    settings = make_settings(steps=2, eval_every=0, out=make_settings().out + "-2")
    other = train(settings, reporter=again)
    assert "No estimate of a step's memory and time: no memory" in again.lines
    # The estimate draws no number that the run would have drawn.
    assert one.bits_per_byte == other.bits_per_byte and math.isfinite(one.bits_per_byte)


def test_memory_of_the_machine_and_of_unknown_devices() -> None:
    free = estimate.free_memory(CPU)
    assert free is None or free > 1 << 28
    assert estimate.free_memory(torch.device("meta")) is None


def test_the_longest_runs_on_a_gpu_took_what_is_said() -> None:
    """FSDP2 computed in bfloat16 there and kept float32 weights and moments, 1.3 GiB: of 20 to 75."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "longest-training-1-2026-11-25.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    model, weights = LongNetConfig.from_dict(record["model"]), 16 * 85_000_000 / 2**30
    for one in record["tried"]:
        settings = TrainSettings(
            out="run", model=model, context=one["tokens"], steps=1, dtype="bfloat16", weights="bfloat16"
        )
        said = step_memory(settings, CPU).activations / 2**30 + weights
        assert said == pytest.approx(one["gib"], rel=0.1)
