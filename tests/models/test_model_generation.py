"""Sampling: against hand computation, and generate's determinism, modes and checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longnet.models import LongNetConfig, LongNetLM
from longnet.models.generation import Sampling
from longnet.models.threads import step_threads

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
    found = Sampling(**options).probabilities(PROBABILITIES.log() + 3.0)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_lower_token() -> None:
    found = Sampling(top_k=2).probabilities(torch.zeros(1, 4))
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert Sampling(temperature=0).draw(torch.zeros(1, 4)).item() == 0


def test_tiny_temperature_and_bfloat16_stay_finite() -> None:
    logits = torch.tensor([[1.0, 1e4, -float("inf")]], dtype=torch.bfloat16)
    found = Sampling(temperature=1e-30, top_p=0.9).probabilities(logits)
    assert found.dtype == torch.float32 and torch.equal(found, torch.tensor([[0.0, 1.0, 0.0]]))


def test_draws_follow_the_probabilities() -> None:
    logits = PROBABILITIES.log().expand(20_000, -1)
    drawn = Sampling(top_k=3).draw(logits, torch.Generator().manual_seed(0))
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
        Sampling(temperature=0).probabilities(PROBABILITIES)


def _double(**changes: Any) -> LongNetLM:
    return _lm(**changes).double()


LENGTHS = (5, 23, 5, 1)


def _ragged(side: str = "right") -> tuple[Tensor, Tensor, list[Tensor]]:
    """Padded prompts, their mask, and the prompts themselves."""
    width, rows = max(LENGTHS), _prompt(len(LENGTHS), max(LENGTHS))
    index = torch.arange(width)
    mask = torch.stack([index >= n if side == "right" else index < width - n for n in LENGTHS])
    return rows, mask, [row[~padded] for row, padded in zip(rows, mask, strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("changes", [{}, {"use_rel_pos_bias": True, "use_xpos": False}])
def test_rows_of_unequal_length_get_what_each_gets_alone(side: str, changes: dict[str, Any]) -> None:
    model = _double(**changes)
    rows, mask, prompts = _ragged(side)
    greedy = model.generate(rows, 12, key_padding_mask=mask, temperature=0)
    seeds = [3, 1, 4, 1]
    sampled = model.generate(rows, 12, key_padding_mask=mask, temperature=1.2, top_k=50, seed=seeds)
    assert greedy.shape == (4, 35) and torch.equal(greedy[:, :23], rows)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert torch.equal(greedy[row, 23:], model.generate(prompt[None], 12, temperature=0)[0, len(prompt) :])
        alone = model.generate(prompt[None], 12, temperature=1.2, top_k=50, seed=seed)
        assert torch.equal(sampled[row, 23:], alone[0, len(prompt) :])


def test_one_seed_serves_rows_of_one_length_as_a_batch() -> None:
    model, (rows, mask, prompts) = _double(), _ragged()
    out = model.generate(rows, 8, key_padding_mask=mask, seed=7)
    pair = model.generate(torch.stack([prompts[0], prompts[2]]), 8, seed=7)
    assert torch.equal(out[[0, 2], 23:], pair[:, 5:])
    assert torch.equal(out[1, 23:], model.generate(prompts[1][None], 8, seed=7)[0, 23:])


def test_a_mask_without_padding_changes_nothing() -> None:
    model, prompt = _lm(), _prompt()
    mask = torch.zeros_like(prompt, dtype=torch.bool)
    assert torch.equal(model.generate(prompt, 9, key_padding_mask=mask, seed=1), model.generate(prompt, 9, seed=1))


def test_padding_may_hold_anything() -> None:
    model, (rows, mask, _) = _double(), _ragged()
    expected = model.generate(rows, 9, key_padding_mask=mask, temperature=0)[:, 23:]
    assert torch.equal(
        model.generate(rows.masked_fill(mask, 255), 9, key_padding_mask=mask, temperature=0)[:, 23:], expected
    )


def _first_end(row: list[int], ends: list[list[int]]) -> int:
    """How many tokens there are up to the first end of a row, all if it has none."""
    return next((n for n in range(1, len(row) + 1) if any(row[:n][-len(end) :] == end for end in ends)), len(row))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("with_eos", [False, True])
def test_rows_end_with_a_sequence(ragged: bool, with_eos: bool) -> None:
    """Against what the same call gives without, as with eos. A sequence that the prompt begins and a new token ends is none."""
    model, rows, mask = _double(), *(_ragged()[:2])
    options: dict[str, Any] = {"key_padding_mask": mask if ragged else None, "temperature": 1.5, "seed": [1, 2, 3, 4]}
    free = model.generate(rows, 15, **options)[:, 23:]
    texts = free.tolist()
    # Of two and three tokens, longer than all that is drawn, and one that goes over the end of a prompt.
    stop = [texts[0][2:4], texts[1][7:10], texts[2][5:7], [3] * 16, [int(rows[3, -1]), texts[3][0]]]
    eos = texts[3][11] if with_eos else None
    ends = [*stop, *([[eos]] if with_eos else [])]
    counts = [_first_end(row, ends) for row in texts]
    assert counts[:3] <= [4, 10, 7] and len(set(counts)) > 1
    out = model.generate(rows, 15, **options, stop=stop, eos=eos, pad=7)[:, 23:]
    assert out.shape == (4, max(counts))
    for row, count, expected in zip(out, counts, free, strict=True):
        assert torch.equal(row[:count], expected[:count]) and (row[count:] == 7).all()
    # Bytes are tokens; ended rows are filled with eos, with 0 where there is none.
    both = model.generate(rows, 15, **options, stop=[bytes(one) for one in stop], eos=eos)[:, 23:]
    assert torch.equal(both, torch.where(out == 7, eos or 0, out))


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_end_with_eos(ragged: bool) -> None:
    """Against what the same call gives without: cut after the first end of each row, padded, and no longer than needed."""
    model, rows, mask = _double(), *(_ragged()[:2])
    options: dict[str, Any] = {"key_padding_mask": mask if ragged else None, "temperature": 1.5, "seed": [1, 2, 3, 4]}
    free = model.generate(rows, 15, **options)[:, 23:]
    ends = [int(free[0, 2]), int(free[1, 9]), *(int(row[4]) for row in free[2:])]
    counts = [next(i for i, token in enumerate(row.tolist()) if token in ends) + 1 for row in free]
    assert 1 < max(counts) < 15 and len(set(counts)) > 1
    seen: list[int] = []
    drawn: list[torch.Tensor] = []
    out = model.generate(rows, 15, **options, eos=ends, pad=7, on_token=seen.append, streamer=drawn.append)
    assert torch.equal(torch.stack(drawn, 1), out[:, rows.shape[1] :])
    assert torch.equal(out[:, :23], rows) and out.shape == (4, 23 + max(counts))
    assert seen == list(range(1, max(counts) + 1))
    for row, count, expected in zip(out[:, 23:], counts, free, strict=True):
        assert torch.equal(row[:count], expected[:count]) and (row[count:] == 7).all()
    # One end, which is what follows by default too.
    alone = model.generate(rows[:1], 15, temperature=0)[0, 23:]
    end = int(alone[0])
    assert torch.equal(model.generate(rows[:1], 15, temperature=0, eos=end)[0, 23:], alone[:1])
    pair = model.generate(rows[:2], 15, temperature=0, eos=end)[:, 23:]
    assert (pair[0] == end).all()


def test_a_row_that_does_not_end_is_as_long_as_asked() -> None:
    model, prompt = _lm(), _prompt()
    free = model.generate(prompt, 6, temperature=0)
    unused = next(token for token in range(256) if token not in free[:, 5:])
    assert torch.equal(model.generate(prompt, 6, temperature=0, eos=unused), free)
    assert model.generate(prompt[:0], 3, eos=1).shape[0] == 0


def test_groups_share_the_layout_of_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for a layout: a length of its own for every group would compile for every group."""
    model, (rows, mask, _) = _lm(), _ragged()
    layouts, plain = set(), model.new_cache

    def spy(batch: int, **options: Any) -> Any:
        cache = plain(batch, **options)
        layouts.add(cache.layers[0].pattern)
        return cache

    monkeypatch.setattr(model, "new_cache", spy)
    model.generate(rows, 2, key_padding_mask=mask)
    assert len(layouts) == 1


HOLE = torch.tensor([[False, True, False, False, False], [False] * 5])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eos": 256}, ValueError, "eos=256: expected a token below vocab_size=256"),
        ({"eos": -1}, ValueError, "eos=-1: expected at least 0"),
        ({"eos": [1, 2.0]}, TypeError, "eos=2.0 has type float"),
        ({"eos": True}, TypeError, "eos=True has type bool"),
        ({"eos": []}, ValueError, r"eos=\[\]: expected at least one token"),
        ({"pad": 3}, ValueError, "pad=3 given without eos or stop"),
        ({"stop": "ab"}, TypeError, "stop='ab' has type str: expected a sequence of sequences of tokens"),
        ({"stop": b"ab"}, TypeError, "stop=b'ab' has type bytes: expected a sequence of sequences"),
        ({"stop": [1, 2]}, TypeError, "stop holds 1 of type int: expected a sequence of tokens"),
        ({"stop": ["ab"]}, TypeError, "stop holds 'ab' of type str"),
        ({"stop": [[1], []]}, ValueError, "expected at least one token in each sequence"),
        ({"stop": []}, ValueError, r"stop=\[\]: expected at least one sequence, or None"),
        ({"stop": [[256]]}, ValueError, "stop=256: expected a token below vocab_size=256"),
        ({"eos": 1, "pad": 256}, ValueError, "pad=256: expected a token below"),
        ({"eos": 1.5}, TypeError, "eos=1.5 has type float: expected an int or a sequence of ints"),
        ({"seed": [1]}, ValueError, r"seed=\[1\] has 1 entries: expected one int, or one for each of 2 rows"),
        ({"seed": [1, "2"]}, TypeError, "seed='2' has type str"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"expected \(B, N\) = \(2, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 5)}, TypeError, "key_padding_mask has type torch.float32"),
        ({"key_padding_mask": HOLE}, ValueError, r"key_padding_mask\[0, 1\] is True inside the prompt"),
        ({"key_padding_mask": HOLE | True}, ValueError, r"key_padding_mask\[0\] is True everywhere"),
    ],
)
def test_bad_ends_and_masks_teach(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _lm().generate(_prompt(), 1, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_steps_of_a_small_model_run_on_one_thread(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = _lm(), []
    # Torch's pool stays as it is: what counts is what it is told.
    current = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: current[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: current.__setitem__(0, count))

    def note(step: int) -> None:
        threads.append(torch.get_num_threads())
        if fails and step == 3:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            model.generate(_prompt(), 4, on_token=note)
    else:
        model.generate(_prompt(), 4, on_token=note)
    # The first step reads the prompt.
    assert threads == [2, 1, 1, 1][: 3 if fails else 4] and current == [2]


def test_steps_of_a_large_model_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("threads were changed"))
    monkeypatch.setattr("longnet.models.threads._SMALL", 100_000)
    model = _lm()
    with step_threads(model, 8):
        pass
    with step_threads(model.to("meta"), 1):
        pass


@pytest.mark.parametrize("name", ["on_token", "streamer"])
def test_what_cannot_be_called_is_named(name: str) -> None:
    model = LongNetLM(LongNetConfig.preset("nano"))
    with pytest.raises(TypeError, match=f"{name}=5 has type int: expected a function, or None"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2, **{name: 5})
