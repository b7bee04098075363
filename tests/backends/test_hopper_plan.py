"""What the Hopper kernels take, and how tensors are brought into their shape; the kernels themselves need a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import pad

from longnet.backends import hopper
from longnet.backends.tma import is_matrix, view_of
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no GPU: with one, kernels are compiled",
)


def split(lengths, rates, length, heads=4, head_offsets="interleaved"):
    nests = make_nests(Pattern.parse(lengths, rates, head_offsets), heads, hopper.UNIT, 64)
    ours, reasons = hopper.split_nests(nests, length)
    assert {*ours, *reasons} == set(nests)
    return [nest.dilation_rates for nest in ours], list(reasons.values())


def test_any_length_is_taken_when_filling_it_up_takes_little() -> None:
    lengths, rates = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
    for length in (10_001, 45_681, 1_000_001):
        assert split(lengths, rates, length, 16, "blocked") == ([(1, 4), (2,), (8,), (16,)], [])


def test_rates_without_a_small_common_multiple_are_not_filled_up_together() -> None:
    ours, (reason,) = split((4000, 4001), (25, 27), 4099)
    assert ours == [(25,)]
    assert reason == "the length 4099 is no multiple of the rate 27, and filling it up would take too much"
    assert split((4000, 4001), (25, 27), 4050) == ([(25,), (27,)], [])


def test_short_segments_and_long_nests_are_not_taken() -> None:
    assert split((32, 2048), (1, 2), 4096)[1] == [
        "segments of 32 tokens at rate 1 are too short for blocks of 128 rows"
    ]
    lengths = tuple(64 * 64 * 2**i for i in range(6))
    ours, (reason,) = split(lengths, (1, 2, 4, 8, 16, 32), 1 << 20)
    assert ours == [] and reason == "they take nests of up to 5 branches, not 6"


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((2, 3, 96, 64), (0, 1, 2, 3), True),
        ((2, 96, 3, 64), (0, 2, 1, 3), True),
        # A length that the unit does not divide: another batch row starts in the middle of a matrix row.
        ((2, 3, 95, 64), (0, 1, 2, 3), False),
        ((2, 3, 96, 48), (0, 1, 2, 3), False),
        ((96, 2, 3, 64), (1, 2, 0, 3), False),
    ],
)
def test_which_tensors_are_matrices(shape, order, expected) -> None:
    x = torch.randn(shape, dtype=torch.float16).permute(order)
    assert is_matrix(x, 64, 16) is expected


def test_a_tensor_that_starts_off_a_boundary_is_no_matrix() -> None:
    room = torch.randn(1, 2, 32, 80, dtype=torch.float16)
    assert is_matrix(room[..., 8:72], 64, 16)
    assert not is_matrix(room[..., 4:68], 64, 16)


@interpreted
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels", "unit"), [(9, 48, 16), (130, 64, 4), (64, 33, 1), (63, 128, 64)])
def test_filling_up_is_padding_with_zeros(length, channels, unit, dtype, count) -> None:
    dim = 64 if channels <= 64 else 128
    tensors = []
    for number in range(count):
        # Strides of their own, and nothing that may be read around them.
        room = torch.full((2, length + 3, 4 + number, channels + 7), float("nan"), dtype=dtype)
        view = room[:, 2 : length + 2, number : 3 + number, 5 : channels + 5].transpose(1, 2)
        tensors.append(view.copy_(torch.randn(2, 3, length, channels)))
    for x, filled in zip(tensors, hopper.fill_up(tensors, dim, unit), strict=True):
        assert torch.equal(filled, pad(x, (0, dim - channels, 0, -length % unit)))
        assert is_matrix(filled, dim, unit)
        assert view_of(filled).tokens % unit == 0
