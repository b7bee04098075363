"""Fine-tuning on two processes, by DDP and by FSDP2, is fine-tuning on one: gradients, losses, predictions, states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from finetune_cohorts import fit_of, make_cohort, settings_of
from ranks import Ranks, started
from torch.distributed.fsdp import FSDPModule

from longnet.gigapath import SlideEncoder
from longnet.slides.finetune.workers import Workers
from longnet.training.ranks import whole


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started(str(tmp_path_factory.mktemp("store") / "store")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "cohort"
    return make_cohort(folder, "--patients", 12, "--slides", 1, "--tiles", 12, "--channels", 8)


CASES = [
    ("classification", "encoder"),
    ("multi-label", "encoder"),
    ("survival", "encoder"),
    ("classification", "abmil"),
]


def _settings(cohort: str, out: str, task: str, parallel: str):
    # Dropout too is that of one process; with FSDP the last layers compute other rows, and draw for them. Three slides a step
    # leave one process a filler.
    chance = {"dropout": 0.1, "drop_path": 0.2} if parallel == "ddp" else {}
    return settings_of(
        Path(cohort), Path(out), task=task, parallel=parallel, depth=2, accumulate=3, epochs=2, warmup=0.0, **chance
    )


def _fit(group: dist.ProcessGroup | None, rank: int, cohort: str, out: str, task: str, name: str, parallel: str):
    """Gradients of three slides in float32, then a whole training in float64."""
    settings = _settings(cohort, out, task, parallel)
    workers = Workers(group)
    torch.set_num_threads(1)
    fit, model = fit_of(settings, name, workers, f"{task}-{name}-{parallel}-{workers.size}-gradients")
    losses = workers.merge(fit.step([0, 1, 2]))
    grads = {key: whole(one.grad) for key, one in model.named_parameters() if one.requires_grad}
    units = [
        isinstance(one, FSDPModule) for one in model.modules() if isinstance(one, SlideEncoder) for one in one.blocks
    ]
    fit, _ = fit_of(settings, name, workers, f"{task}-{name}-{parallel}-{workers.size}", torch.float64)
    fitted = fit.run()
    return losses, grads, units, [asdict(one) for one in fitted.epochs], fitted.outputs, fitted.weights


# DDP copies the gradient of the class token, whose strides are another shape's.
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("task", "name"), CASES)
def test_two_processes_are_one(ranks: Ranks, cohort: Path, tmp_path: Path, task: str, name: str, parallel: str) -> None:
    arguments = (str(cohort), str(tmp_path), task, name, parallel)
    losses, grads, _, epochs, outputs, weights = _fit(None, 0, *arguments)
    for found in ranks(2, _fit, *arguments):
        assert found[0] == pytest.approx(losses, abs=1e-5)
        assert found[2] == ([parallel == "fsdp"] * 2 if name == "encoder" else [])
        torch.testing.assert_close(found[1], grads, rtol=1e-5, atol=1e-5)
        for one, other in zip(found[3], epochs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        torch.testing.assert_close(found[4], outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[5], weights, rtol=1e-5, atol=1e-5)


def test_a_step_is_the_mean_of_its_slides_alone(cohort: Path, tmp_path: Path) -> None:
    """Restated: gradients of each slide by itself, averaged in float64."""
    settings = _settings(str(cohort), str(tmp_path), "classification", "ddp")
    together, model = fit_of(settings, state="together")
    together.step([3, 5, 8])
    alone = []
    for slide in (3, 5, 8):
        fit, other = fit_of(settings, state="alone")
        fit.step([slide])
        alone.append({name: one.grad.double() for name, one in other.named_parameters() if one.grad is not None})
    for name, one in model.named_parameters():
        if one.requires_grad:
            expected = torch.stack([grads[name] for grads in alone]).mean(0)
            torch.testing.assert_close(one.grad.double(), expected, rtol=1e-5, atol=1e-6)
