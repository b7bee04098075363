"""A row that is padded on the left has other segments than alone: a warning says so, and only then."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from longnet import DilatedAttention, DilatedCache, LongNetConfig, LongNetEncoder
from longnet.attention.padding import warn_left_padding
from longnet.geometry import Pattern

pytestmark = pytest.mark.filterwarnings("error:a row is padded on the left")

PATTERN = Pattern.parse((8, 24), (1, 2))


def mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "-" for letter in row] for row in rows])


def warned(given: Tensor, pattern: Pattern = PATTERN, **options: object) -> bool:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_left_padding(given, pattern, **options)  # type: ignore[arg-type]
    return any("padded on the left" in str(one.message) for one in found)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (("-xxxxxxxxx", "xxxxxxxxxx"), True),
        (("xxxxxxxxxx", "---xxxxxxx"), True),
        (("xxxxxxxx--", "x-xxxxxxxx"), False),
        (("----------",), False),  # no token to differ
        (("-" * 24 + "x" * 30,), False),  # whole segments
        (("-" * 8 + "x" * 30,), True),
        (("--xxxx",), False),  # all inside the first segments, moved by a whole step of the dilation
        (("-xxxxx",), True),
        (("-" * 10 + "x" * 4,), False),  # all inside one segment of each branch, moved by a whole step
        (("", ""), False),
    ],
)
def test_only_padding_that_moves_segments_is_told(rows: tuple[str, ...], expected: bool) -> None:
    assert warned(mask(*rows)) is expected


@pytest.mark.parametrize(
    ("pattern", "padding", "expected"),
    [
        (Pattern.compose(window=5), 3, False),
        (Pattern.compose(None, 1), 3, False),
        (Pattern.compose(None, 4, dilated_queries=False, window=5, dilation_block=2), 8, False),
        (Pattern.compose(None, 4, dilated_queries=False, window=5, dilation_block=2), 4, True),
        (Pattern.compose(8, 2, dilation_block=2), 8, False),
        (Pattern.compose(24, 2, dilation_block=2), 4, False),
        (Pattern.compose(24, 2, dilation_block=2), 2, True),
    ],
)
def test_windows_strides_and_blocks_move_by_their_own_cycle(pattern: Pattern, padding: int, expected: bool) -> None:
    assert warned(mask("-" * padding + "x" * 9), pattern) is expected


def test_padding_moves_rows_on_their_own_grid() -> None:
    # Four tokens fill the end of a segment of 8, and cross it where padding moves them.
    assert warned(mask("--xxxx"), Pattern.parse(8, 1), segment_offset=4)
    assert not warned(mask("--xxxx"), Pattern.parse(8, 1), segment_offset=2)
    assert not warned(mask("-" * 8 + "xxxx"), Pattern.parse(8, 1), segment_offset=4)


@pytest.mark.parametrize("rows", ["--xxxx", "-" * 24 + "x" * 30, "-" * 10 + "x" * 4])
def test_what_is_not_told_changes_nothing(rows: str) -> None:
    module, given = attention(), mask(rows)
    x = torch.randn(1, len(rows), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = rows.index("x")
    torch.testing.assert_close(module(x, given)[:, start:], module(x[:, start:]), rtol=1e-10, atol=1e-10)


def test_documents_are_rows() -> None:
    row = mask("xxxx--" + "--xxxx" + "x-xx")
    assert not warned(row, bounds=(0, 6, 12, 16))
    assert warned(row, bounds=(0, 7, 12, 16))
    assert warned(mask("-xxx"), bounds=(0, 0, 4))


def test_a_device_is_asked_for_its_first_mask_alone() -> None:
    """Meta tensors stand for a device here: to ask one raises."""
    moved = mask("-xxxxxxxxx").to("meta")
    assert not warned(moved) and not warned(moved, first=True)
    module = attention()
    with pytest.warns(UserWarning, match="padded on the left"):
        module(torch.zeros(1, 10, 16, dtype=torch.float64), mask("-xxxxxxxxx"))
    assert module._mask_seen


def attention() -> DilatedAttention:
    torch.manual_seed(0)
    return DilatedAttention(16, 4, (1, 2), (8, 24), causal=True, use_xpos=True, dtype=torch.float64).eval()


def config(causal: bool) -> LongNetConfig:
    return LongNetConfig.preset("nano", causal=causal)


LEFT, RIGHT = mask("-" * 5 + "x" * 35, "x" * 40), mask("x" * 35 + "-" * 5, "x" * 40)


def test_an_encoder_tells_of_left_padding() -> None:
    model = LongNetEncoder(config(causal=False)).eval()
    tokens = torch.arange(80).view(2, 40)
    model(tokens, RIGHT)
    with pytest.warns(UserWarning, match=r"padded on the left.*Pad on the right.*cu_seqlens.*one row at a time"):
        padded = model(tokens, LEFT)
    # What is told is so.
    assert not torch.allclose(padded[0, 5:], model(tokens[:1, 5:])[0], atol=1e-2)


def test_a_stream_tells_once_a_row_has_moved() -> None:
    module, x = attention().requires_grad_(False), torch.randn(2, 40, 16, dtype=torch.float64)
    cache = DilatedCache((8, 24), (1, 2), batch_size=2, heads=4, head_dim=4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="padded on the left"):
        module(x[:, :20], LEFT[:, :20], cache=cache)
    module(x[:, 20:], LEFT[:, 20:], cache=cache)
    assert cache.padding.tolist() == [5, 0]


def test_python_shows_it_once() -> None:
    model = LongNetEncoder(config(causal=False)).eval()
    tokens = torch.arange(80).view(2, 40)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            model(tokens, LEFT)
    assert len(found) == 1


def test_a_compiled_model_does_not_look() -> None:
    module = torch.compile(attention(), backend="eager", fullgraph=True)
    for _ in range(2):
        module(torch.zeros(1, 10, 16, dtype=torch.float64), mask("-xxxxxxxxx"))
