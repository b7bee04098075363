"""The chunked loss: equal to plain cross-entropy, bounded in the logits it holds."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet.models import LongNetConfig, LongNetLM, loss

VOCAB, CHUNK, DIM = 251, 16, 32


def _lm(dtype: torch.dtype = torch.float64, **changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig.preset("nano", vocab_size=VOCAB, loss_chunk=CHUNK, **changes), dtype=dtype)


def _pair(batch: int = 3, length: int = 35) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, VOCAB, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:].contiguous()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tie", [True, False])
def test_value_and_gradients_are_plain_cross_entropys(reduction: str, tie: bool) -> None:
    model, (tokens, targets) = _lm(tie_embeddings=tie), _pair()
    targets[0, 3] = targets[2, 20:] = -100
    weights = torch.linspace(0.1, 1.0, targets.numel(), dtype=torch.float64).view_as(targets)

    def scalar(loss: Tensor) -> Tensor:
        return (loss * weights).sum() if reduction == "none" else loss

    loss = model.loss(tokens, targets, reduction=reduction)
    scalar(loss).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction=reduction)
    expected = expected.view_as(loss)
    scalar(expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 104, 105, 106, 10_000])
def test_any_chunk_gives_the_same_loss(chunk: int) -> None:
    tokens, targets = _pair()
    reference = _lm().loss(tokens, targets, reduction="none")
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano", vocab_size=VOCAB, loss_chunk=chunk), dtype=torch.float64)
    torch.testing.assert_close(model.loss(tokens, targets, reduction="none"), reference, rtol=1e-12, atol=1e-12)


def test_no_gradients_needed() -> None:
    model, (tokens, targets) = _lm(), _pair()
    with torch.no_grad():
        loss = model.loss(tokens, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, model.loss(tokens, targets).detach())


class _LogitsWatch(TorchDispatchMode):
    """Counts the positions in living tensors whose last dimension is the vocabulary.

    A (dim, vocabulary) tensor is the head's transposed weight or its gradient, not logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held, self.largest, self.most, self.seen = 0, 0, 0, 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(tensor, Tensor)
                and tensor.ndim >= 2
                and tensor.shape[-1] == VOCAB
                and tensor.shape[-2] != DIM
            ):
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        rows, storage = tensor.numel() // VOCAB, tensor.untyped_storage()
        self.seen += 1
        self.largest = max(self.largest, rows)
        if storage.data_ptr() in self.storages:
            return
        self.storages.add(storage.data_ptr())
        self.held += rows
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._release, storage.data_ptr(), rows)

    def _release(self, pointer: int, rows: int) -> None:
        self.storages.discard(pointer)
        self.held -= rows


def test_logits_of_a_long_sequence_are_never_held_at_once() -> None:
    """Neither by the forward pass, nor for the backward pass, nor by it."""
    model, (tokens, targets) = _lm(torch.float32), _pair(2, 320)
    with _LogitsWatch() as watch:
        loss = model.loss(tokens, targets)
        assert watch.seen >= 640 // CHUNK
        assert watch.held == 0
        loss.backward()
    assert watch.largest == CHUNK
    # Logits, their log-softmax and its gradient of one chunk; the tensors of a chunk are freed before the next.
    assert watch.most <= 4 * CHUNK
    assert watch.seen >= 2 * 640 // CHUNK


@pytest.mark.parametrize(("logits", "positions"), [(VOCAB * 50 + 9, 50), (VOCAB * 5, 20)])
def test_a_chunk_holds_so_many_logits_by_default(monkeypatch: pytest.MonkeyPatch, logits: int, positions: int) -> None:
    assert loss.positions_at_once(None, 256) == 65_536 and loss.positions_at_once(None, 50_000) == 4096
    monkeypatch.setattr(loss, "_LOGITS", logits)
    monkeypatch.setattr(loss, "_LEAST", 20)
    config = LongNetConfig.preset("nano", vocab_size=VOCAB, loss_chunk=None)
    model, (tokens, targets) = LongNetLM(config), _pair(2, 320)
    with _LogitsWatch() as watch:
        model.loss(tokens, targets).backward()
    assert watch.largest == positions


def test_watch_sees_what_is_held() -> None:
    model, (tokens, _) = _lm(torch.float32), _pair(2, 320)
    with _LogitsWatch() as watch:
        logits = model(tokens)
        assert watch.held >= 640 and watch.largest == 640
    assert logits.shape == (2, 320, VOCAB)


def test_positions_that_do_not_count() -> None:
    model, (tokens, targets) = _lm(), _pair()
    every = model.loss(tokens, targets, reduction="none")
    some = targets.clone()
    some[1] = some[0, ::2] = 7
    losses = model.loss(tokens, some, reduction="none", ignore_index=7)
    counted = some != 7
    assert torch.equal(losses[~counted], torch.zeros_like(losses[~counted]))
    torch.testing.assert_close(losses[counted], every[counted], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.loss(tokens, some, ignore_index=7), every[counted].mean(), rtol=1e-12, atol=1e-12)


def test_nothing_to_count_is_zero_with_zero_gradients() -> None:
    model, (tokens, targets) = _lm(), _pair()
    loss = model.loss(tokens, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p.grad)) for p in model.parameters())
    assert model.loss(tokens[:, :0], targets[:, :0]).item() == 0.0
    assert model.loss(tokens[:0], targets[:0], reduction="none").shape == (0, 35)


def test_padded_positions_do_not_count() -> None:
    """A padded batch has the loss of its rows alone."""
    model, (tokens, targets) = _lm(), _pair()
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, 20:] = mask[2, 1:] = True
    loss = model.loss(tokens, targets, key_padding_mask=mask, reduction="sum")
    alone = [
        model.loss(tokens[i : i + 1, :n], targets[i : i + 1, :n], reduction="sum")
        for i, n in ((0, 35), (1, 20), (2, 1))
    ]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-10, atol=1e-10)
    mean = model.loss(tokens, targets, key_padding_mask=mask)
    torch.testing.assert_close(mean * 56, loss, rtol=1e-12, atol=1e-12)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    model, (tokens, targets) = _lm(torch.bfloat16), _pair()
    losses = model.loss(tokens, targets, reduction="none")
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_bad_inputs_teach() -> None:
    model, (tokens, targets) = _lm(), _pair()
    with pytest.raises(ValueError, match="reduction='average'"):
        model.loss(tokens, targets, reduction="average")
    with pytest.raises(ValueError, match=r"targets has shape \(3, 34\).*\(3, 35\)"):
        model.loss(tokens, targets[:, 1:])
    with pytest.raises(TypeError, match=r"targets has dtype torch.float64"):
        model.loss(tokens, targets.double())
    with pytest.raises(ValueError, match=r"targets holds the ids .*251"):
        model.loss(tokens, targets.masked_fill(targets == targets[0, 0], VOCAB))
    with pytest.raises(ValueError, match="targets holds the ids -100"):
        model.loss(tokens, targets.masked_fill(targets == targets[0, 0], -100), ignore_index=-1)
