"""The band kernels in Triton's interpreter, against the definition."""

from __future__ import annotations

import importlib.util
from typing import Any

import interpreted
import pytest
import torch
from beyond import calls, compare, draw_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense_attention

from longnet import dilated_attention
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.backends.triton import bands
from longnet.attention.functional import pattern_attention
from longnet.geometry import Branch, Pattern

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.*to no head:UserWarning"),
]
interpreted_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled: tests/gpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What long sequences do with large blocks, short ones do with small blocks."""
    interpreted.hasten()
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: triton_flash.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(triton_flash, "LEAST_ROWS", 1)


@interpreted_only
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=calls(),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    length=st.integers(1, 90),
    offsets=st.integers(-99, 99) | st.lists(st.integers(-99, 99), min_size=2, max_size=2),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_softmax_over_all_keys(
    call: dict[str, Any],
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    offsets: int | list[int],
    padded: bool,
    seed: int,
) -> None:
    *inputs, grad = draw_tensors(batch, kv_heads * group, kv_heads, length, seed, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3 if padded else None
    offset = offsets if isinstance(offsets, int) else torch.tensor(offsets[:batch])
    options = {**call, "segment_offset": offset, "key_padding_mask": mask}
    got = dilated_attention(*inputs, **options, return_lse=True, backend="triton")
    compare(got, dense_attention(*exact, **options), inputs, grad, exact, 3e-5)


NEST_AND_WINDOW: dict[str, Any] = {"segment_lengths": (16, 32, 64), "dilation_rates": (1, 2, 4), "window": 11}


@interpreted_only
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_is_mixed_into_a_nest(is_causal: bool) -> None:
    *inputs, grad = draw_tensors(2, 4, 2, 77, 0, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    options = {**NEST_AND_WINDOW, "is_causal": is_causal}
    got = dilated_attention(*inputs, **options, return_lse=True, backend="triton")
    compare(got, dense_attention(*exact, **options), inputs, grad, exact, 3e-5)


@interpreted_only
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("offset", "head_offsets"), [(5, "interleaved"), (-1000, "blocked"), (torch.tensor([37, 64]), "blocked")]
)
def test_a_nest_begins_anywhere(
    is_causal: bool, offset: int | torch.Tensor, head_offsets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that branches share are visited once on every grid: the kernels of nests run, and those of bands do not."""
    launches: list[object] = []
    plan = bands.band_launches
    monkeypatch.setattr(bands, "band_launches", lambda *given: launches.append(plan(*given)) or launches[-1])
    *inputs, grad = draw_tensors(2, 4, 2, 90, 0, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    options: dict[str, Any] = {
        "segment_lengths": (16, 32, 64), "dilation_rates": (1, 2, 4), "is_causal": is_causal,
        "segment_offset": offset, "head_offsets": head_offsets,
    }  # fmt: skip
    got = dilated_attention(*inputs, **options, return_lse=True, backend="triton")
    compare(got, dense_attention(*exact, **options), inputs, grad, exact, 3e-5)
    assert launches and not any(launches)


@interpreted_only
@pytest.mark.parametrize(
    "kind",
    [
        {"segment_lengths": (None,), "dilation_rates": (3,), "window": 5, "dilated_queries": False},
        {"segment_lengths": (8, 16), "dilation_rates": (1, 3), "dilation_block": 2},
    ],
    ids=["stride", "blocks"],
)
@pytest.mark.parametrize("offset", [0, torch.tensor([3, -7])], ids=["one grid", "rows"])
def test_heads_that_were_kept_have_the_grid_and_the_offsets_of_all(
    kind: dict[str, Any], offset: int | torch.Tensor
) -> None:
    """Two query heads to a key/value head, whose offsets are alike; the middle ones are gone."""
    *inputs, grad = draw_tensors(2, 6, 3, 40, 0, torch.float32)
    options = {"head_offsets": "grouped", "is_causal": True, "segment_offset": offset}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    numbers, shared = [0, 1, 4, 5], [0, 2]
    kept = [x[:, heads].detach().requires_grad_() for x, heads in zip(inputs, (numbers, shared, shared), strict=True)]
    pattern = Pattern.compose(**kind, head_offsets="grouped", head_numbers=numbers, total_heads=6)
    got = pattern_attention(*kept, pattern, is_causal=True, segment_offset=offset, backend="triton")
    want = dense_attention(*exact, **kind, **options)[0][:, numbers]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    whole = torch.autograd.grad(want, exact, grad[:, numbers].double())
    for one, other, heads in zip(
        torch.autograd.grad(got, kept, grad[:, numbers]), whole, (numbers, shared, shared), strict=True
    ):
        torch.testing.assert_close(one.double(), other[:, heads], rtol=1e-4, atol=1e-5)


@interpreted_only
def test_no_kernel_reads_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised outputs full of NaN: some launch writes each row before another mixes into it."""
    empty_like, empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **more: empty_like(*args, **more).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: empty(*args, **more).fill_(torch.nan))
    kinds: list[dict[str, Any]] = [
        {"segment_lengths": (), "dilation_rates": (), "window": 5},
        {"segment_lengths": None, "dilation_rates": 3, "dilated_queries": False},
        {"segment_lengths": None, "dilation_rates": 3, "dilated_queries": False, "window": 5},
        {"segment_lengths": (8, 16), "dilation_rates": (1, 2), "segment_offset": 3},
        {"segment_lengths": 16, "dilation_rates": 2, "dilation_block": 2},
        NEST_AND_WINDOW,
    ]
    for kind in kinds:
        *inputs, grad = draw_tensors(1, 2, 2, 40, 1, torch.float32)
        out = dilated_attention(*inputs, **kind, is_causal=True, backend="triton")
        for x in (out, *torch.autograd.grad(out, inputs, grad)):
            assert bool(x.isfinite().all()), kind


@settings(max_examples=200)
@given(
    length=st.integers(1, 200),
    width=st.none() | st.integers(1, 60),
    rate=st.integers(1, 9),
    block=st.integers(1, 9),
    offset=st.integers(0, 99),
)
def test_no_grid_is_too_small(length: int, width: int | None, rate: int, block: int, offset: int) -> None:
    pattern = Pattern.compose(width, rate if width is None else min(rate, width), dilation_block=block)
    branch: Branch = pattern.branches[0]
    origin = branch.origin(offset)
    for head in range(branch.dilation_rate):
        rows = sum(branch.selects(position + origin, head) for position in range(length))
        assert rows <= branch.most_rows(length)
