"""Windows, strided keys, blocks, grids that are offset, segments without end: against the definition."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from beyond import calls, compare, draw_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention, multiplicity
from torch import Tensor

from longnet import dilated_attention
from longnet.attention.definition import warn_uncovered
from longnet.attention.functional import pattern_attention
from longnet.attention.key_ranges import key_ranges
from longnet.geometry import Pattern, uncovered_positions

# Every position is covered in none of these by necessity.
pytestmark = pytest.mark.filterwarnings("ignore:.*to no head:UserWarning")


@settings(max_examples=150)
@given(
    call=calls(),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 120),
    offsets=st.integers(-99, 99) | st.lists(st.integers(-99, 99), min_size=3, max_size=3),
    padded=st.booleans(),
    backend=st.sampled_from(["auto", "portable"]),
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
    backend: str,
    seed: int,
) -> None:
    *inputs, grad = draw_tensors(batch, kv_heads * group, kv_heads, length, seed)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3 if padded else None
    offset = offsets if isinstance(offsets, int) else torch.tensor(offsets[:batch])
    options = {**call, "segment_offset": offset, "key_padding_mask": mask}
    got = dilated_attention(*inputs, **options, return_lse=True, backend=backend)
    compare(got, dense_attention(*inputs, **options), inputs, grad)


@settings(max_examples=40)
@given(call=calls(), cuts=st.lists(st.integers(0, 70), max_size=4), by_document=st.booleans(), seed=st.integers(0, 99))
def test_documents_count_from_their_own_start(
    call: dict[str, Any], cuts: list[int], by_document: bool, seed: int
) -> None:
    bounds = [0, *sorted(cuts), 70]
    *inputs, grad = draw_tensors(1, 4, 2, 70, seed)
    offsets = torch.randint(-50, 50, (len(bounds) - 1,), generator=torch.Generator().manual_seed(seed))
    offset: Any = offsets if by_document else int(offsets[0])
    got = dilated_attention(*inputs, **call, cu_seqlens=bounds, segment_offset=offset, return_lse=True)
    parts = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        own = [x[:, :, start:stop] for x in inputs]
        parts.append(dense_attention(*own, **call, segment_offset=int(offsets[number if by_document else 0])))
    want = tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))
    compare(got, want, inputs, grad)


@settings(max_examples=60)
@given(call=calls(), length=st.integers(1, 80), offset=st.integers(-99, 99), seed=st.integers(0, 99))
def test_a_relative_bias(call: dict[str, Any], length: int, offset: int, seed: int) -> None:
    *inputs, grad = draw_tensors(2, 4, 2, length, seed)
    bias = torch.randn(
        4, 2 * length + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    pattern_arguments = {name: call[name] for name in call.keys() - {"is_causal", "scale"}}
    pattern = Pattern.compose(**pattern_arguments)
    options = {"is_causal": call["is_causal"], "scale": call["scale"], "segment_offset": offset}
    got: Any = pattern_attention(*inputs, pattern, distance_bias=bias, return_lse=True, **options)
    place = torch.arange(length)
    table = bias[:, place - place[:, None] + bias.shape[1] // 2]
    want = dense_attention(*inputs, **pattern_arguments, **options, score_bias=table)
    compare(got, want, [*inputs, bias], grad)


@settings(max_examples=60)
@given(
    call=calls(),
    length=st.integers(1, 24),
    offset=st.integers(-30, 30),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_the_table_of_a_pattern(call: dict[str, Any], length: int, offset: int, kv_heads: int, group: int) -> None:
    scale = call.pop("scale")
    assert scale is None or scale
    heads = kv_heads * group
    options = {"is_causal": call.pop("is_causal"), "segment_offset": offset, "kv_heads": kv_heads}
    pattern = Pattern.compose(**call)
    table = torch.tensor(pattern.multiplicity(length, heads=heads, **options), dtype=torch.float64)
    want = multiplicity(
        call.pop("segment_lengths"), call.pop("dilation_rates"), heads, length, options["is_causal"],
        call.pop("head_offsets"), **call, segment_offset=offset, kv_heads=kv_heads,
    )  # fmt: skip
    assert torch.equal(table, want)
    head, place = torch.arange(heads), torch.arange(length)
    mask = pattern.mask_mod(heads=heads, **options)(None, head[:, None, None], place[:, None], place)
    assert torch.equal(mask.expand(want.shape), want > 0)


FLEX: list[dict[str, Any]] = [
    {"window": 5},
    {"window": 5, "segment_lengths": None, "dilation_rates": 3, "dilated_queries": False},
    {"window": 5, "segment_lengths": None, "dilation_rates": 2, "dilated_queries": False, "dilation_block": 4},
    {"segment_lengths": (16, 64), "dilation_rates": (1, 4)},
    {"segment_lengths": (16, None), "dilation_rates": (1, 4), "dilation_block": 2},
]


@pytest.mark.parametrize("call", FLEX, ids=lambda call: "-".join(map(str, call)))
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offset", [0, 7])
def test_flex_attention_gives_the_same(call: dict[str, Any], is_causal: bool, offset: int) -> None:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    pattern = Pattern.compose(**call)
    query, key, value, _ = (x.detach() for x in draw_tensors(2, 4, 4, 96, 0, torch.float32))
    options: dict[str, Any] = {"heads": 4, "is_causal": is_causal, "segment_offset": offset}

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + pattern.times_read(head, row, column, **options).clamp(min=1).log()

    block_mask = create_block_mask(pattern.mask_mod(**options), None, 4, 96, 96, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, more = flex_attention(
            query, key, value, score_mod, block_mask=block_mask, return_aux=AuxRequest(lse=True)
        )
    call = {"segment_lengths": (), "dilation_rates": (), **call}
    got, lse = dilated_attention(query, key, value, **call, is_causal=is_causal, segment_offset=offset, return_lse=True)
    covered = lse > -torch.inf
    torch.testing.assert_close(got[covered], want[covered], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[covered], more.lse[covered], rtol=1e-5, atol=1e-5)
    assert covered.float().mean() > 0.4


WINDOW_AND_STRIDE: dict[str, Any] = {
    "segment_lengths": None,
    "dilation_rates": 2,
    "window": 6,
    "dilated_queries": False,
    "is_causal": True,
}


def test_another_offset_is_no_other_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    *inputs, _ = draw_tensors(2, 4, 2, 40, 0)
    counter = CompileCounterWithBackend("aot_eager")

    def attend(offset: int | Tensor) -> Any:
        return dilated_attention(*inputs, (8, 16), (1, 2), segment_offset=offset, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(2), attend(2))
    graphs = counter.frame_count
    for offset in (5, -3, 11, 4):
        torch.testing.assert_close(compiled(offset), attend(offset))
    assert counter.frame_count == graphs > 0
    by_row = torch.tensor([3, -8])
    torch.testing.assert_close(compiled(by_row), attend(by_row))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["window", "dilation_block"])
def test_a_second_number_compiles(name: str) -> None:
    """The second time dynamo takes a number as a symbol."""
    *inputs, _ = draw_tensors(2, 4, 2, 40, 0)

    def attend(options: dict[str, int]) -> Any:
        return dilated_attention(*inputs, 16, 2, is_causal=True, **options)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for number in (2, 3, 5):
        torch.testing.assert_close(compiled({name: number}), attend({name: number}))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["cpu_flash", "portable"])
def test_opcheck(name: str) -> None:
    from longnet.attention.call import AttentionSpec

    *inputs, _ = draw_tensors(2, 4, 4, 20, 0, torch.float32)
    pattern = Pattern.compose((8, None), (1, 3), window=3, dilated_queries=False, dilation_block=2)
    spec = AttentionSpec(pattern, True, 0.5)
    torch.library.opcheck(
        getattr(torch.ops.longnet, name).default, (*inputs, None, torch.tensor([3, -5]), None, *spec.encode())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    *inputs, grad = draw_tensors(2, 4, 2, 90, 1, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = dilated_attention(*inputs, **WINDOW_AND_STRIDE, return_lse=True)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    call = {**WINDOW_AND_STRIDE, "segment_lengths": (None,), "dilation_rates": (2,)}
    want = dense_attention(*exact, **call)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=tolerance)
    grads = (
        torch.autograd.grad((got[0] * grad).sum(), inputs),
        torch.autograd.grad((want[0] * grad.double()).sum(), exact),
    )
    for one, other in zip(*grads, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_a_later_token_changes_no_earlier_row() -> None:
    *inputs, _ = draw_tensors(1, 4, 2, 64, 2, torch.float32)
    first = dilated_attention(*inputs, **WINDOW_AND_STRIDE)
    with torch.no_grad():
        for x in inputs:
            x[:, :, 40:] = 7.0
    assert torch.equal(dilated_attention(*inputs, **WINDOW_AND_STRIDE)[:, :, :40], first[:, :, :40])


def test_the_script_that_compares_many_calls_runs() -> None:
    script = Path(__file__).parents[1] / "scripts" / "check_patterns.py"
    done = subprocess.run([sys.executable, str(script), "--cases", "30"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "30 cases, 0 above 1e-10" in done.stdout, done.stdout + done.stderr


def test_memory_is_linear_in_the_length() -> None:
    """Of a window the portable backend makes no table of all pairs."""
    from longnet.attention.chunked import Rows

    (ranges,) = key_ranges(Pattern.compose(window=128), 2, 1 << 16, True, 0)
    x = torch.empty(2, 1 << 16, 0)
    sizes = [
        (queries.stop - queries.start) * (keys.stop - keys.start)
        for _, queries, keys in Rows(x, x, x, 1.0, ranges=ranges)._chunks()
    ]
    assert sum(sizes) < 2 * 128 * (1 << 16)


def test_dead_rows_and_padding_may_hold_anything() -> None:
    *inputs, grad = draw_tensors(2, 4, 2, 50, 3)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[0, :9] = True
    options = {**WINDOW_AND_STRIDE, "key_padding_mask": mask, "segment_offset": torch.tensor([-9, 0])}
    grad[mask[:, None, :, None].expand_as(grad)] = 0.0
    want = dilated_attention(*inputs, **options)
    expected = torch.autograd.grad(want, inputs, grad)
    broken = []
    for x in inputs:
        y = x.detach().clone()
        y[mask[:, None, :, None].expand_as(y)] = torch.nan
        broken.append(y.requires_grad_())
    got = dilated_attention(*broken, **options)
    kept = ~mask[:, None, :, None].expand_as(got)
    assert torch.equal(got[kept], want[kept])
    for one, other in zip(torch.autograd.grad(got, broken, grad), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group": "any"}, "group="),
        ({"backend": "cpu_flash", "scale": 1e4}, "cpu_flash: its gradients lose their digits"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], said: str) -> None:
    *inputs, _ = draw_tensors(1, 2, 2, 20, 0, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=said):
        dilated_attention(*inputs, **WINDOW_AND_STRIDE, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"segment_lengths": None, "dilation_rates": 3, "dilation_block": 4, "dilated_queries": False},
            r"\(8, 9, 10, 11, \.\.\.; 33.3% of the first 65,536\): they are read by no query. Give .* a head \(more heads",
        ),
        (
            {"segment_lengths": (16,), "dilation_rates": (3,), "head_offsets": "grouped"},
            r"segment_lengths=\(16,\).*they get zero attention\. Give .* a head \(more key/value heads",
        ),
        ({"segment_lengths": 64, "dilation_rates": 4, "dilation_block": 1 << 30}, None),
        ({"segment_lengths": None, "dilation_rates": 3, "window": 1}, None),
    ],
)
def test_what_is_left_uncovered_is_said(call: dict[str, Any], said: str | None) -> None:
    *inputs, _ = draw_tensors(1, 2, 2, 20, 0, torch.float32)
    warn_uncovered.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        dilated_attention(*inputs, **call)
    assert len(found) == (said is not None)
    if said is not None:
        assert re.search(said, str(found[0].message)), found[0].message


def test_numbers_as_large_as_they_may_be() -> None:
    """No sum or product of them leaves 64 bits."""
    largest = 1 << 40
    *inputs, grad = draw_tensors(2, 2, 2, 9, 0)
    for offset in (largest, -largest, torch.tensor([largest, -largest])):
        for block, rate in ((largest, 1), (largest // 4, 4)):
            options: dict[str, Any] = {
                "window": largest,
                "dilated_queries": False,
                "dilation_block": block,
                "segment_offset": offset,
                "segment_lengths": (None, largest),
                "dilation_rates": (rate, rate),
            }
            for backend in ("auto", "portable"):
                got = dilated_attention(*inputs, **options, return_lse=True, backend=backend)
                compare(got, dense_attention(*inputs, **options), inputs, grad)


def test_torchs_default_device_changes_nothing() -> None:
    inputs = [x.detach() for x in draw_tensors(1, 4, 2, 47, 5)[:3]]
    for backend in ("cpu_flash", "portable"):
        for segments in (7, None):
            call: dict[str, Any] = {"dilation_rates": 5, "dilated_queries": False, "backend": backend}
            warn_uncovered.cache_clear()
            with torch.device("meta"):
                got = dilated_attention(*inputs, segments, **call, segment_offset=segments or 0)
            want = dilated_attention(*inputs, segments, **call, segment_offset=segments or 0)
            assert torch.equal(got, want) and got.device.type == "cpu"


def test_long_sequences_stay_in_no_cache() -> None:
    pattern = Pattern.compose(window=3)
    short, long = (key_ranges(pattern, 1, length, True, 0) for length in (100, 100_000))
    assert key_ranges(pattern, 1, 100, True, 0) is short and key_ranges(pattern, 1, 100_000, True, 0) is not long


def test_a_pattern_keeps_its_groups() -> None:
    pattern = Pattern.compose(16, 3, head_offsets="grouped")
    assert pattern.grouped(6, 2).multiplicity(30, heads=6) == pattern.multiplicity(30, heads=6, kv_heads=2)
    assert pattern.multiplicity(30, heads=6) != pattern.multiplicity(30, heads=6, kv_heads=2)
    with pytest.raises(ValueError, match="heads=6 is not divisible by kv_heads=4"):
        pattern.mask_mod(heads=6, kv_heads=4)
    with pytest.raises(TypeError, match="segment_offset=1.5 has type float"):
        pattern.mask_mod(heads=6, segment_offset=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads=0: expected at least 1"):
        pattern.multiplicity(4, heads=0)


def test_blocks_that_repeat_late_are_not_counted() -> None:
    with pytest.raises(ValueError, match="dilation_block=10000 times a rate of 4 is too long to count"):
        uncovered_positions(Pattern.compose(None, 4, dilation_block=10_000), 2)
    assert uncovered_positions(Pattern.compose(None, 4, dilation_block=4096), 2).fraction == Fraction(1, 2)
