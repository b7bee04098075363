"""``LongNetForSequenceClassification``: which tokens it reads, in every type; its losses and their accumulation."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from longnet_models import QUICK, make, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

# bfloat16 holds no odd integer above 256, float16 none above 2,048.
HALF = [(torch.bfloat16, 301), (torch.float16, 2054)]


def classifier(**changes: Any) -> Any:
    return make("LongNetForSequenceClassification", num_hidden_layers=1, **changes)


@pytest.mark.parametrize(("dtype", "length"), HALF)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_decoder_reads_the_last_token_in_half_precision(dtype: torch.dtype, length: int, side: str) -> None:
    model, ids = classifier().to(dtype), tokens(2, length)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :7] = 0
    elif side == "right":
        mask[0, -2:] = 0
    last = [length - 3 if side == "right" else length - 1, length - 1]
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        given = model(ids, attention_mask=None if side == "none" else mask).logits
        expected = model.score(hidden[[0, 1], last])
    assert not torch.equal(hidden[[0, 1], last], hidden[[0, 1], [n - 1 for n in last]])
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("dtype", "length"), HALF)
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_takes_the_mean_of_all_tokens_in_half_precision(
    dtype: torch.dtype, length: int, padded: bool
) -> None:
    model, ids = classifier(is_causal=False), tokens(2, length)
    # Channels near 100: their sum is beyond float16, and a count that is rounded to 8 bits shows.
    torch.nn.init.constant_(model.model.stack.norm.bias, 100.0)
    torch.nn.init.eye_(model.score.weight)
    model.to(dtype)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, :4] = 0
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        given = model(ids, attention_mask=mask if padded else None).logits
    expected = hidden[:, 4 if padded else 0 :].double().mean(1)[:, :2].to(dtype)
    assert given.dtype == dtype
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


LOSSES = {
    "single_label_classification": torch.tensor([0, 2, 1, 2]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]),
    "regression": torch.tensor([[0.5, -1, 2], [3, 0, 1], [-2, 1, 0], [1, 1, 4]]),
}


def trained(folder: Path, labels: Tensor, model: Any, size: int, accumulated: int) -> Any:
    """The classifier after one step of plain gradient descent on all rows, and the loss that Trainer logs."""
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens(len(labels), 9), labels, strict=True)]
    options = TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        **QUICK,
    )
    run = Trainer(model, options, train_dataset=rows)  # type: ignore[arg-type]
    run.train()
    return model.score.weight.detach(), run.state.log_history[0]["loss"]


@functools.cache
def _trained_on_one_batch(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return trained(Path(folder), LOSSES[kind], classifier(num_labels=3, problem_type=kind), 4, 1)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("size", "accumulated"), [(1, 4), (3, 2)], ids=["4 x 1", "3 + 1"])
def test_accumulated_gradients_are_those_of_one_batch(kind: str, size: int, accumulated: int, tmp_path: Path) -> None:
    def model() -> Any:
        return classifier(num_labels=3, problem_type=kind)

    whole, loss = _trained_on_one_batch(kind)
    parts, same = trained(tmp_path, LOSSES[kind], model(), size, accumulated)
    assert (whole - model().score.weight).abs().max() > 1e-3
    torch.testing.assert_close(parts, whole)
    # Trainer rounds what it logs.
    assert same == pytest.approx(loss, abs=2e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_means_over_the_batch(kind: str) -> None:
    model, labels = classifier(num_labels=3, problem_type=kind), LOSSES[kind]
    out = model(tokens(4, 9), labels=labels)
    logits = out.logits.double()
    expected = {
        "single_label_classification": lambda: -logits.log_softmax(-1)[range(4), labels].mean(),
        "multi_label_classification": lambda: (
            -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
        ),
        "regression": lambda: (logits - labels).square().mean(),
    }[kind]()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    of_more = model(tokens(4, 9), labels=labels, num_items_in_batch=5 * labels.numel()).loss
    torch.testing.assert_close(of_more, out.loss / 5)
