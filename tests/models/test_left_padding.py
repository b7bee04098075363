"""A language model's row that is padded on the left gives what it gives alone: at once, in chunks, generating."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet import LongNetConfig, LongNetLM
from longnet.models.layer_types import LAYER_TYPES
from longnet.models.padding import RowsFromStart

pytestmark = pytest.mark.filterwarnings("error:a row is padded on the left", "ignore:.*to no head:UserWarning")

LENGTH = 90
CACHED = [None, *((one,) for one in LAYER_TYPES), LAYER_TYPES]


def make(layer_types: tuple[str, ...] | None, **changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    options: dict[str, Any] = {"sliding_window": 9, "stride": 2, "stride_block": 3, "kv_heads": 2, "layers": 5}
    config = LongNetConfig.preset("nano", layer_types=layer_types, **options | changes)
    model = LongNetLM(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int) -> Tensor:
    return torch.randint(256, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def alone(model: LongNetLM, ids: Tensor, padding: list[int]) -> list[Tensor]:
    return [model(ids[row : row + 1, start:])[0].detach() for row, start in enumerate(padding)]


def check(got: Tensor, want: list[Tensor], padding: list[int]) -> None:
    for row, start in enumerate(padding):
        torch.testing.assert_close(got[row, start:], want[row], rtol=1e-10, atol=1e-10)


def left(padding: list[int]) -> Tensor:
    return torch.arange(LENGTH) < torch.tensor(padding)[:, None]


@pytest.mark.parametrize("layer_types", CACHED)
@pytest.mark.parametrize("use_xpos", [True, False])
def test_each_row_is_what_it_is_alone(layer_types: tuple[str, ...] | None, use_xpos: bool) -> None:
    padding = [0, 1, 7, 42, LENGTH - 1]
    model, ids, mask = make(layer_types, use_xpos=use_xpos), tokens(5), left(padding)
    check(model(ids, mask), alone(model, ids, padding), padding)
    # Behind a row's end there may be more padding; a row may be nothing else.
    both = mask | (torch.arange(LENGTH) >= LENGTH - 1)
    both[0] = True
    got = model(ids, both)
    for row, start in list(enumerate(padding))[1:4]:
        want = model(ids[row : row + 1, start : LENGTH - 1])[0]
        torch.testing.assert_close(got[row, start : LENGTH - 1], want, rtol=1e-10, atol=1e-10)
    assert got.isfinite().all()


def test_keys_that_are_shifted() -> None:
    padding = [0, 1, 42]
    model = make(("strided_attention", "full_attention"), shift_keys=True, layers=2)
    check(model(tokens(3), left(padding)), alone(model, tokens(3), padding), padding)


@pytest.mark.parametrize("layer_types", CACHED)
def test_losses_and_gradients(layer_types: tuple[str, ...] | None) -> None:
    padding = [0, 7, 42]
    model, ids, mask = make(layer_types), tokens(3), left(padding)
    targets = ids.roll(-1, 1)
    losses = model.loss(ids, targets, key_padding_mask=mask, reduction="none")
    assert not losses[mask].any()
    want = torch.stack([
        model.loss(ids[row : row + 1, start:], targets[row : row + 1, start:], reduction="sum")
        for row, start in enumerate(padding)
    ])  # fmt: skip
    torch.testing.assert_close(losses.sum(1), want, rtol=1e-10, atol=1e-10)
    weights = list(model.parameters())
    pairs = (torch.autograd.grad(loss.sum(), weights) for loss in (losses, want))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_right_padding_and_no_padding_are_as_before() -> None:
    """Bit by bit, and without another order of the tokens."""
    model, ids = make(None), tokens(2)
    right = torch.arange(LENGTH) >= torch.tensor([LENGTH, 50])[:, None]
    for mask in (right, torch.zeros_like(right), None):
        assert RowsFromStart.of(right) is None
        assert torch.equal(model.hidden(ids, mask), model.run_blocks(model.embed(ids), mask))
    # Where a mask is not looked at, as on a device, the order is the one that there is.
    rows = RowsFromStart.of(right.to("meta"))
    assert rows is not None and rows.order.shape == (2, LENGTH)


def test_a_compiled_model_gives_the_same() -> None:
    padding = [0, 7]
    model, ids = make(LAYER_TYPES), tokens(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(compiled(ids, left(padding)), alone(model, ids, padding), padding)


@given(
    st.sampled_from(CACHED),
    st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=4),
    st.lists(st.integers(1, LENGTH - 1), max_size=6),
    st.booleans(),
)
@settings(max_examples=40)
def test_chunks_into_a_cache(
    layer_types: tuple[str, ...] | None, padding: list[int], cuts: list[int], is_known: bool
) -> None:
    """Also where a row's padding ends in a later chunk than the first."""
    model, ids, mask = (
        make(layer_types, layers=5 if layer_types == LAYER_TYPES else 2),
        tokens(len(padding)),
        left(padding),
    )
    cache = model.new_cache(len(padding), max_length=LENGTH if is_known else None)
    bounds = sorted({0, *cuts, LENGTH})
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start, stop in itertools.pairwise(bounds):
            part = mask[:, start:stop]
            # Once every row has begun, a mask says nothing new.
            parts.append(model(ids[:, start:stop], part if part.any() or start == 0 else None, cache=cache))
    check(torch.cat(parts, 1), alone(model, ids, padding), padding)


def test_a_cache_that_is_reset_forgets_the_padding() -> None:
    model, ids = make(LAYER_TYPES), tokens(2)
    cache = model.new_cache(2)
    model(ids, left([3, 40]), cache=cache)
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache), model(ids).detach(), rtol=1e-10, atol=1e-10)
    cache.reset()
    fork = cache.clone()
    padding = [30, 1]
    check(model(ids, left(padding), cache=fork), alone(model, ids, padding), padding)


@pytest.mark.parametrize("layer_types", CACHED)
def test_generating(layer_types: tuple[str, ...] | None) -> None:
    padding = [0, 7, 42]
    model, ids = make(layer_types), tokens(3)
    result = model.generate(ids, 12, key_padding_mask=left(padding), temperature=0)
    for row, start in enumerate(padding):
        want = model.generate(ids[row : row + 1, start:], 12, temperature=0)
        assert torch.equal(result[row, LENGTH:], want[0, -12:])
