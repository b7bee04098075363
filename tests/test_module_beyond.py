"""DilatedAttention with windows, strides, blocks, offset grids and shifted keys, against the definition in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from beyond import calls
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import dense_module
from torch import Tensor

from longnet import DilatedAttention
from longnet.nn.shift_keys import shift_keys

pytestmark = pytest.mark.filterwarnings("ignore:.*to no head:UserWarning", "ignore:a row is padded on the left")

LARGEST = 1 << 40


def module_of(draw: Any, heads: int, kv_heads: int) -> DilatedAttention:
    call = draw(calls())
    return DilatedAttention(
        heads * 4, heads, call["dilation_rates"], call["segment_lengths"], causal=call["is_causal"],
        use_xpos=draw(st.booleans()), use_rel_pos_bias=draw(st.booleans()), qk_norm=draw(st.booleans()),
        kv_heads=kv_heads, sub_norm=draw(st.sampled_from([None, "layer"])), head_offsets=call["head_offsets"],
        window=call["window"], dilated_queries=call["dilated_queries"], dilation_block=call["dilation_block"],
        segment_offset=draw(st.sampled_from([0, LARGEST, -LARGEST]) | st.integers(-70, 70)),
        shift_keys=draw(st.booleans()), dtype=torch.float64,
    )  # fmt: skip


def scale_base(module: DilatedAttention) -> float | None:
    """xPos's, None where it may not scale: keys are read across all segments."""
    pattern = module.pattern
    if module.xpos is None or pattern.window is not None or None in pattern.given_lengths:
        return None
    return module.xpos.scale_base


@given(st.data(), st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.integers(0, 70), st.integers(0, 999))
@settings(max_examples=60)
def test_random_modules(data: st.DataObject, heads: tuple[int, int], length: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = module_of(data.draw, *heads)
    x = torch.randn(2, length, module.dim, dtype=torch.float64, requires_grad=True)
    mask = data.draw(st.sampled_from([None, 0.2, 0.7]))
    mask = None if mask is None else torch.rand(2, length) < mask
    offset = data.draw(st.none() | st.integers(-70, 70) | st.lists(st.integers(-70, 70), min_size=2, max_size=2))
    given_offset = torch.tensor(offset) if isinstance(offset, list) else offset
    got = module(x, mask, segment_offset=given_offset)
    want = dense_module(module, x, mask, segment_offset=offset, scale_base=scale_base(module))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(got)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(want, leaves, grad, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(got, leaves, grad, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(st.data(), st.sampled_from([(2, 1), (4, 2)]), st.lists(st.integers(0, 40), min_size=1, max_size=3))
@settings(max_examples=40)
def test_packed_documents_are_alone(data: st.DataObject, heads: tuple[int, int], lengths: list[int]) -> None:
    torch.manual_seed(sum(lengths))
    module = module_of(data.draw, *heads)
    bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    x = torch.randn(1, bounds[-1], module.dim, dtype=torch.float64)
    offsets = data.draw(st.none() | st.lists(st.integers(-70, 70), min_size=len(lengths), max_size=len(lengths)))
    got = module(x, cu_seqlens=bounds, segment_offset=None if offsets is None else torch.tensor(offsets))
    for number, (start, stop) in enumerate(pairwise(bounds)):
        offset = None if offsets is None else [offsets[number]]
        alone = dense_module(module, x[:, start:stop], segment_offset=offset, scale_base=scale_base(module))
        torch.testing.assert_close(got[:, start:stop], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_xpos_stays_finite_on_an_offset_grid_and_without_segments(dtype: torch.dtype) -> None:
    for options, bounded in (
        ({"segment_size": 4096, "dilation_rate": 1, "segment_offset": 2730}, True),
        ({"segment_size": (), "dilation_rate": (), "window": 64}, False),
        ({"segment_size": (256, None), "dilation_rate": (1, 4)}, False),
    ):
        module = DilatedAttention(16, 2, causal=True, use_xpos=True, **options)  # type: ignore[arg-type]
        assert module.xpos is not None and module.xpos.scaled == bounded and module.xpos.scale_base == 512
        far = module.xpos.tables(64, dtype, start=10**9, whole=10**9 + 64, segment_offset=-(10**12))
        assert all(table.isfinite().all() for table in far)
        stream = module.xpos.tables(64, dtype, start=10**9, streaming=True)
        assert all(table.isfinite().all() for table in stream)
        if not bounded:
            # Rotated alone: cosines and sines of one circle.
            assert torch.allclose(far[0] ** 2 + far[1] ** 2, torch.ones_like(far[0]))


def test_a_row_on_a_grid_of_its_own_is_the_row_alone() -> None:
    torch.manual_seed(0)
    module = DilatedAttention(32, 4, (1, 3), (24, 96), causal=True, use_xpos=True, dtype=torch.float64)
    x, padding = torch.randn(3, 200, 32, dtype=torch.float64), torch.tensor([0, 7, 130])
    mask = torch.arange(200) < padding[:, None]
    got = module(x, mask, segment_offset=-padding)
    for row, start in enumerate(padding.tolist()):
        torch.testing.assert_close(got[row, start:], module(x[row : row + 1, start:])[0], rtol=1e-10, atol=1e-10)


def test_shifted_keys_by_hand() -> None:
    key = torch.arange(1.0, 11.0).view(1, 1, 5, 2)  # second channels: 2, 4, 6, 8, 10
    padding = torch.tensor([[True, True, False, False, False]])
    place = torch.tensor([0, 1, 2, 0, 1])
    for options, expected in (
        ({}, [0, 2, 4, 6, 8]),
        ({"padding": padding}, [0, 0, 0, 6, 8]),
        ({"in_document": place}, [0, 2, 4, 0, 8]),
        ({"padding": padding, "in_document": place}, [0, 0, 0, 0, 8]),
    ):
        got = shift_keys(key, **options)
        assert got[0, 0, :, 0].tolist() == [1, 3, 5, 7, 9] and got[0, 0, :, 1].tolist() == expected
    assert shift_keys(key[:, :, :0]).shape == (1, 1, 0, 2)


def test_a_padded_token_that_is_not_finite_reaches_no_key() -> None:
    key = torch.ones(1, 1, 3, 4, requires_grad=True)
    poisoned = torch.where(torch.tensor([True, False, False])[:, None], torch.nan, key)
    got = shift_keys(poisoned, padding=torch.tensor([[True, False, False]]))
    assert got[:, :, 1:].isfinite().all()
    (grad,) = torch.autograd.grad(got[:, :, 1:].sum(), key)
    assert grad.isfinite().all()


def test_what_was_given_is_shown() -> None:
    plain = repr(DilatedAttention(16, 4, 2, 8))
    assert "window" not in plain and "segment_offset" not in plain and "shift_keys" not in plain
    shown = repr(
        DilatedAttention(
            16, 4, 2, None, window=5, dilated_queries=False, dilation_block=3, segment_offset=-1, shift_keys=True
        )
    )
    for said in ("segment_lengths=(None,)", "window=5", "dilated_queries=False", "dilation_block=3"):
        assert said in shown
    assert "segment_offset=-1" in shown and "shift_keys=True" in shown


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"segment_size": (), "dilation_rate": ()}, ValueError, r"segment_size=\(\) .*window=None"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 1.5}, TypeError, "window=1.5"),
        ({"window": True}, TypeError, "window=True"),
        ({"dilation_block": 0}, ValueError, "dilation_block=0"),
        ({"dilated_queries": 1}, TypeError, "dilated_queries=1"),
        ({"segment_offset": True}, TypeError, "segment_offset=True"),
        ({"segment_offset": 1.0}, TypeError, "segment_offset=1.0"),
        ({"segment_offset": 1 << 41}, ValueError, "segment_offset="),
        ({"shift_keys": "yes"}, TypeError, "shift_keys='yes'"),
        ({"check_coverage": 1}, TypeError, "check_coverage=1"),
        ({"head_offsets": "paired"}, ValueError, "head_offsets='paired'"),
    ],
)
def test_what_a_module_refuses(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        DilatedAttention(16, 4, **({"dilation_rate": 2, "segment_size": 8} | options))


@pytest.mark.parametrize(
    ("offset", "error", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \(3,\): expected \(B,\) = \(2,\)"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "int32"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"shape \(2, 1\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "is on meta"),
        (0.5, TypeError, "segment_offset=0.5"),
    ],
)
def test_what_a_call_refuses(offset: Tensor, error: type[Exception], said: str) -> None:
    module = DilatedAttention(16, 4, 2, 8, use_xpos=True)
    with pytest.raises(error, match=said):
        module(torch.zeros(2, 5, 16), segment_offset=offset)
