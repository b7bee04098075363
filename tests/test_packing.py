"""Documents packed into one row: each as the oracle gives it alone, and none sees another."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import Problem, backward, problems, relative_error
from torch import Tensor

from longnet import DilatedAttention, dilated_attention
from longnet.attention.packed import _LONG, _moves, boundaries, make_buckets

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")

lengths = st.lists(st.integers(0, 30) | st.sampled_from([0, 1, 12, 90, 100]), min_size=0, max_size=7)
PROBLEM = Problem(1, 2, 2, 1, 5, ((8, 1), (12, 3)), True, "interleaved", None, True, 3)


def packed(problem: Problem, documents: list[int]) -> tuple[Problem, tuple[int, ...]]:
    return replace(problem, batch=1, length=sum(documents)), tuple(accumulate(documents, initial=0))


def oracle(problem: Problem, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    inputs = tuple(x.detach().double().requires_grad_() for x in problem.tensors())
    mask, options = problem.mask(), problem.options()
    outs, lses = [inputs[0][:, :, :0]], [inputs[0][:, :, :0, 0]]
    for start, stop in pairwise(bounds):
        options["key_padding_mask"] = None if mask is None else mask[:, start:stop]
        parts = (x[:, :, start:stop] for x in inputs)
        out, lse = dense_attention(*parts, problem.segment_lengths, problem.dilation_rates, **options)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    return out, lse, backward(out, lse, inputs, problem.upstream()) if problem.length else ()


@settings(deadline=None)
@given(problems(), lengths, st.sampled_from([1, 16, 1024]), st.sampled_from([torch.int32, torch.int64, None]))
@example(PROBLEM, [], 1024, None)
@example(PROBLEM, [0, 0], 1024, torch.int32)
@example(PROBLEM, [1, 1, 1], 1024, torch.int64)
@example(replace(PROBLEM, is_causal=False), [100, 80, 9, 0, 1, 70], 1024, torch.int64)
def test_each_document_is_as_if_alone(
    problem: Problem, documents: list[int], long: int, dtype: torch.dtype | None
) -> None:
    problem, bounds = packed(problem, documents)
    inputs = problem.tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_LONG, "cpu", long)
        out, lse = dilated_attention(
            *inputs,
            problem.segment_lengths,
            problem.dilation_rates,
            cu_seqlens=bounds if dtype is None else torch.tensor(bounds, dtype=dtype),
            return_lse=True,
            **problem.options(),
        )
    expected_out, expected_lse, expected_gradients = oracle(problem, bounds)
    assert out.shape == expected_out.shape and out.dtype == inputs[0].dtype
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert relative_error(out, expected_out) < 1e-10
    assert relative_error(lse.masked_fill(lse.isinf(), 0), expected_lse.masked_fill(lse.isinf(), 0)) < 1e-10
    if sum(documents):
        for got, expected in zip(backward(out, lse, inputs, problem.upstream()), expected_gradients, strict=True):
            assert relative_error(got, expected) < 1e-10


@given(lengths, st.integers(1, 50))
def test_buckets_hold_every_document_once(documents: list[int], long: int) -> None:
    bounds = tuple(accumulate(documents, initial=0))
    buckets = make_buckets(bounds, long)
    held = sorted(document for bucket in buckets for document in bucket.documents)
    assert held == [(start, stop - start) for start, stop in pairwise(bounds) if stop > start]
    for bucket in buckets:
        assert bucket.longest == max(tokens for _, tokens in bucket.documents)
        assert not (bucket.padded and bucket.longest >= long)


def test_thousands_of_documents_are_few_calls() -> None:
    sizes = torch.randint(1, 100_000, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(make_buckets(tuple(accumulate(sizes, initial=0)), 1 << 30)) < 40


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_document_sees_another(is_causal: bool) -> None:
    problem, bounds = packed(replace(PROBLEM, is_causal=is_causal), [17, 30, 25])
    inputs = [x.detach() for x in problem.tensors()]

    def run() -> Tensor:
        return dilated_attention(*inputs, (8, 12), (1, 3), is_causal=is_causal, cu_seqlens=bounds)

    before = run()
    for x in inputs:
        x[:, :, 17:47] = torch.nan
    after = run()
    assert torch.equal(before[:, :, :17], after[:, :, :17])
    assert torch.equal(before[:, :, 47:], after[:, :, 47:])


def test_documents_of_one_length_are_not_copied() -> None:
    """The kernel reads the caller's memory: its batch rows are views."""
    for documents in ([8, 8, 8], [2000, 3000, 1500]):
        bounds = tuple(accumulate(documents, initial=0))
        assert _moves(make_buckets(bounds, _LONG["cpu"]), torch.device("cpu")) is None


@pytest.mark.parametrize("kind", ["xpos", "bias", "plain"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_restarts_positions(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    module = DilatedAttention(
        16, 4, (1, 2), (8, 16), causal=causal, use_xpos=kind == "xpos", use_rel_pos_bias=kind == "bias"
    ).double()
    if module.rel_pos_bias is not None:
        torch.nn.init.normal_(next(module.rel_pos_bias.parameters()))
    documents = [11, 0, 30, 1, 19]
    x = torch.randn(1, sum(documents), 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, sum(documents)) < 0.2
    out = module(x, mask, cu_seqlens=torch.tensor(list(accumulate(documents, initial=0))))
    parts = zip(x.split(documents, 1), mask.split(documents, 1), strict=True)
    expected = torch.cat([module(part, its) for part, its in parts], 1)
    assert relative_error(out, expected) < 1e-10
    upstream = torch.randn_like(out)
    got, wanted = (torch.autograd.grad((y * upstream).sum(), x)[0] for y in (out, expected))
    assert relative_error(got, wanted) < 1e-10


# The rest of a function after a graph break asks for .grad of what came before it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_it_works_compiled() -> None:
    problem, bounds = packed(PROBLEM, [20, 9, 14])
    inputs = problem.tensors()

    def attend(cu_seqlens: Tensor) -> Tensor:
        return dilated_attention(*inputs, (8, 12), (1, 3), is_causal=True, cu_seqlens=cu_seqlens) * 2

    cu_seqlens = torch.tensor(bounds)
    expected = attend(cu_seqlens)
    # The graph breaks at the documents' lengths; what is around them needs no code generator here.
    assert torch.equal(torch.compile(attend, backend="aot_eager")(cu_seqlens), expected)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 5]), ValueError, r"cu_seqlens=\(0, 5\): expected boundaries .* end at N = 12"),
        (torch.tensor([1, 12]), ValueError, "start at 0"),
        (torch.tensor([0, 7, 5, 12]), ValueError, "never fall"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"cu_seqlens=\(\)"),
        (torch.tensor([[0, 12]]), ValueError, r"cu_seqlens has shape \(1, 2\): expected \(documents \+ 1,\)"),
        (torch.tensor([0.0, 12.0]), TypeError, "cu_seqlens has dtype torch.float32"),
        ((0, 12.0), TypeError, "cu_seqlens holds 12.0 of type float"),
        (12, TypeError, "cu_seqlens has type int"),
    ],
)
def test_bad_boundaries(cu_seqlens: object, error: type[Exception], message: str) -> None:
    x = torch.randn(1, 2, 12, 4)
    with pytest.raises(error, match=message):
        dilated_attention(x, x, x, 4, 1, cu_seqlens=cu_seqlens)


def test_more_rows_and_caches_are_refused() -> None:
    x = torch.randn(2, 2, 12, 4)
    with pytest.raises(ValueError, match="B = 2 with cu_seqlens"):
        dilated_attention(x, x, x, 4, 1, cu_seqlens=(0, 12))
    module = DilatedAttention(16, 2, 1, 8, causal=True)
    with pytest.raises(ValueError, match="cu_seqlens given with a cache"):
        module(torch.randn(1, 12, 16), cu_seqlens=(0, 12), cache=object())
    module.distributed = True
    with pytest.raises(ValueError, match="cu_seqlens given with distributed=True"):
        module(torch.randn(1, 12, 16), cu_seqlens=(0, 12))


def test_a_group_is_refused(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        x = torch.randn(1, 2, 12, 4)
        with pytest.raises(ValueError, match="cu_seqlens given with a group"):
            dilated_attention(x, x, x, 4, 1, cu_seqlens=(0, 12), group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


def test_ints_and_tensors_say_the_same() -> None:
    assert boundaries([0, 3, 3, 9], 9) == boundaries(torch.tensor([0, 3, 3, 9], dtype=torch.int32), 9) == (0, 3, 3, 9)
