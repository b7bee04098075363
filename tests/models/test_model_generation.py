"""Sampling: against hand computation, and generate's determinism, modes and checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longnet.models import LongNetConfig, LongNetLM
from longnet.models.generation import sample, sampling_probabilities

# Probabilities 0.1, 0.5, 0.15, 0.25 for the tokens 0, 1, 2, 3.
PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)


def _lm(**changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig.preset("nano", **changes))


def _prompt(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 2 / 3, 0.0, 1 / 3]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 0.4}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [0.0, 2 / 3, 0.0, 1 / 3]),
        ({"top_p": 0.8}, [0.0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0]),
        # top-p acts on what top-k left: of 5/9, 2.5/9, 1.5/9 the first two reach 0.8, of all four three would.
        ({"top_k": 3, "top_p": 0.8}, [0.0, 2 / 3, 0.0, 1 / 3]),
        # temperature 0.5 squares the probabilities: 0.01, 0.25, 0.0225, 0.0625.
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 0.5, "top_k": 2}, [0.0, 0.8, 0.0, 0.2]),
        ({"temperature": 1e-300}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_probabilities_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    found = sampling_probabilities(PROBABILITIES.log() + 3.0, **options)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_lower_token() -> None:
    found = sampling_probabilities(torch.zeros(1, 4), top_k=2)
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert sample(torch.zeros(1, 4), temperature=0).item() == 0


def test_tiny_temperature_and_bfloat16_stay_finite() -> None:
    logits = torch.tensor([[1.0, 1e4, -float("inf")]], dtype=torch.bfloat16)
    found = sampling_probabilities(logits, temperature=1e-30, top_p=0.9)
    assert found.dtype == torch.float32 and torch.equal(found, torch.tensor([[0.0, 1.0, 0.0]]))


def test_draws_follow_the_probabilities() -> None:
    logits = PROBABILITIES.log().expand(20_000, -1)
    drawn = sample(logits, top_k=3, generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / 20_000
    # Standard deviation of a frequency here is at most 0.0036.
    torch.testing.assert_close(frequency, torch.tensor([0.0, 5 / 9, 1.5 / 9, 2.5 / 9]), rtol=0, atol=0.015)


def test_the_same_seed_gives_the_same_tokens() -> None:
    model, prompt = _lm(), _prompt()
    torch.manual_seed(1)
    first = model.generate(prompt, 12, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, model.generate(prompt, 12, seed=7))
    assert not torch.equal(first, model.generate(prompt, 12, seed=8))
    assert first.shape == (2, 17) and torch.equal(first[:, :5], prompt)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    model = _lm()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model.generate(_prompt(), 3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    unseeded = model.generate(_prompt(), 12)
    torch.manual_seed(1)
    assert torch.equal(model.generate(_prompt(), 12), unseeded)


def test_greedy_is_the_argmax_of_the_full_forward() -> None:
    model, prompt = _lm(dropout=0.5), _prompt()
    out = model.generate(prompt, 30, temperature=0)
    logits = model.eval()(out)
    assert torch.equal(out[:, 5:], logits[:, 4:-1].argmax(-1))
    assert torch.equal(model.generate(prompt, 30, top_k=1, seed=3), out)


def test_only_the_last_position_goes_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = _lm(), []
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (shapes.append(tuple(hidden.shape)), head(hidden))[1])
    model.generate(_prompt(), 4, seed=0)
    assert shapes == [(2, 32)] * 4


def test_modes_come_back_and_no_gradients_are_kept() -> None:
    model = _lm()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    inside: list[tuple[int, bool, bool]] = []
    out = model.generate(
        _prompt(), 3, seed=0, on_token=lambda step: inside.append((step, model.training, torch.is_grad_enabled()))
    )
    assert inside == [(1, False, False), (2, False, False), (3, False, False)]
    assert [module.training for module in model.modules()] == modes
    assert not out.requires_grad

    def stop(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(_prompt(), 3, on_token=stop)
    assert [module.training for module in model.modules()] == modes


def test_nothing_to_add_and_no_rows() -> None:
    model, prompt = _lm(), _prompt()
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert model.generate(prompt[:0], 3).shape == (0, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens=2.0"),
        ({"temperature": -0.5}, ValueError, "temperature=-0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"temperature": "hot"}, TypeError, "temperature='hot'"),
        ({"top_k": 0}, ValueError, "top_k=0"),
        ({"top_k": 1.5}, TypeError, "top_k=1.5"),
        ({"top_p": 0.0}, ValueError, "top_p=0.0"),
        ({"top_p": 1.1}, ValueError, "top_p=1.1"),
        ({"seed": 1.5}, TypeError, "seed=1.5"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "at least one token"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, ValueError, r"tokens has shape \(3,\)"),
        ({"tokens": torch.full((1, 1), 256)}, ValueError, "256"),
    ],
)
def test_bad_options_teach(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _lm().generate(**{"tokens": _prompt(), "max_new_tokens": 1, **options})


def test_no_distribution_at_temperature_zero() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        sampling_probabilities(PROBABILITIES, temperature=0)
