"""``dilated_attention`` against the dense float64 oracle, on every backend."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention
from patterns import Problem, backward, problems, relative_error

from longnet import dilated_attention
from longnet.attention import chunked
from longnet.attention.backends.cpu_flash import backend as cpu_flash
from longnet.attention.definition import warn_uncovered

pytestmark = pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head")
BACKENDS = ("cpu_flash", "portable")


def run(problem: Problem, backend: str):
    inputs = problem.tensors()
    out, lse = dilated_attention(
        *inputs, problem.segment_lengths, problem.dilation_rates, return_lse=True, backend=backend, **problem.options()
    )
    return out, lse, backward(out, lse, inputs, problem.upstream())


def check(problem: Problem, backend: str, tolerance: float, oracle=Problem.oracle) -> None:
    out, lse, grads = run(problem, backend)
    expected_out, expected_lse, expected_grads = oracle(problem)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert not any(x.isnan().any() for x in (out, lse, *grads))
    finite = ~expected_lse.isinf()
    assert relative_error(out, expected_out) < tolerance
    assert relative_error(lse[finite], expected_lse[finite]) < tolerance
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_float64_equals_the_definition(backend, problem):
    check(problem, backend, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_small_blocks_and_chunks_change_nothing(backend, problem):
    """The paths of long sequences, taken by short ones: blocks of one window, scores a few rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_flash, "_BLOCK", 1)
        patch.setattr(chunked, "_SCORES", 16)
        check(problem, backend, 1e-10)


@pytest.fixture(scope="module")
def oracle():
    """The definition, once for all backends."""
    return cache(Problem.oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", [None, 0.3])
def test_paper_like_pattern_at_several_kernel_blocks(oracle, backend, is_causal, padding):
    """Segments longer than the kernel's own query and key blocks, and a length that divides nothing."""
    problem = Problem(1, 2, 2, 1733, 16, ((300, 1), (700, 2), (1600, 5)), is_causal, "interleaved", padding, True, 7)
    check(problem, backend, 1e-10, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_float32(backend, problem):
    problem = Problem(**{**problem.__dict__, "dtype": torch.float32})
    out, lse, grads = run(problem, backend)
    expected_out, _, expected_grads = problem.oracle()
    assert lse.dtype == torch.float32
    assert relative_error(out, expected_out) < 1e-5
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_is_within_twice_torchs_own_error(backend, dtype, is_causal):
    """The rule of the FlashAttention test suite: at most twice the error of torch's attention in the same type."""
    problem = Problem(
        1, 2, 2, 520, 32, ((64, 1), (128, 2), (256, 4), (512, 8)), is_causal, "interleaved", None, True, 3, dtype
    )
    inputs = problem.tensors()
    grad_out = problem.upstream()[0]

    def errors(outputs, reference):
        return [relative_error(got, expected) for got, expected in zip(outputs, reference, strict=True)]

    def outputs(attend, tensors):
        out = attend(*tensors)
        return (out, *torch.autograd.grad(out, tensors, grad_out.to(out.dtype)))

    args = (problem.segment_lengths, problem.dilation_rates)
    double = tuple(x.detach().double().requires_grad_() for x in inputs)
    reference = outputs(lambda q, k, v: dense_attention(q, k, v, *args, is_causal=is_causal)[0], double)
    ours = errors(
        outputs(lambda q, k, v: dilated_attention(q, k, v, *args, is_causal=is_causal, backend=backend), inputs),
        reference,
    )

    def torchs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    allowed = errors(outputs(torchs, inputs), outputs(torchs, double))
    for error, limit in zip(ours, allowed, strict=True):
        assert error <= 2 * limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_branch_over_everything_is_plain_attention(backend):
    q, k, v = (torch.randn(2, 3, 50, 8, dtype=torch.float64) for _ in range(3))
    for is_causal in (False, True):
        out = dilated_attention(q, k, v, 64, 1, is_causal=is_causal, backend=backend)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert relative_error(out, expected) < 1e-12


def test_a_key_that_two_branches_share_counts_twice():
    """With two equal branches every weight is doubled and every denominator too: out stays, lse grows by ln 2."""
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    out, lse = dilated_attention(q, k, v, 8, 2, return_lse=True)
    twice, twice_lse = dilated_attention(q, k, v, (8, 8), (2, 2), return_lse=True)
    assert relative_error(twice, out) < 1e-12
    finite = ~lse.isinf()
    assert torch.allclose(twice_lse[finite] - lse[finite], torch.tensor(2.0, dtype=torch.float64).log())


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), at=st.integers(0, 44))
@settings(max_examples=40, deadline=None)
def test_causal_outputs_are_bit_identical_whatever_comes_later(backend, problem, at):
    problem = Problem(**{**problem.__dict__, "is_causal": True, "dtype": torch.float32})
    at = min(at, problem.length - 1)
    before = [x.detach() for x in problem.tensors()]
    after = [x.clone() for x in before]
    for x in after:
        x[:, :, at + 1 :] = 100 * torch.randn(x[:, :, at + 1 :].shape)
    args = (problem.segment_lengths, problem.dilation_rates)
    first, second = (dilated_attention(*x, *args, backend=backend, **problem.options()) for x in (before, after))
    assert torch.equal(first[:, :, : at + 1], second[:, :, : at + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padded_keys_hold_never_matters(backend):
    q, k, v = (torch.randn(2, 2, 30, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 20:] = mask[1, ::2] = True
    poison = torch.where(mask[:, None, :, None], torch.nan, 0.0)
    results = []
    for key, value in ((k, v), (k + poison, v + poison)):
        out = dilated_attention(q, key, value, (8, 16), (1, 3), key_padding_mask=mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    for grad in results[0][2:]:
        assert not grad.transpose(1, 2)[mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gives_each_row_what_it_gets_alone(backend):
    q, k, v = (torch.randn(2, 4, 40, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 27:] = True
    args = ((8, 32), (2, 4))
    together = dilated_attention(q, k, v, *args, key_padding_mask=mask, backend=backend)
    alone = dilated_attention(*(x[1:, :, :27] for x in (q, k, v)), *args, backend=backend)
    assert relative_error(together[1:, :, :27], alone) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero_with_zero_gradients(backend):
    """Heads 0 and 1 of three residues: every third position has no branch; one whole row of the batch is padding."""
    q, k, v = (torch.randn(2, 2, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[1] = True
    out, lse = dilated_attention(q, k, v, 6, 3, key_padding_mask=mask, return_lse=True, backend=backend)
    covered = (torch.arange(12) % 3)[None] == torch.arange(2)[:, None]
    assert torch.equal(lse[0].isfinite(), covered)
    assert (lse[1] == -torch.inf).all()
    assert not out[0][~covered].any() and not out[1].any()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad in grads:
        assert not grad[1].any() and not grad[0][~covered].any() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_written_everywhere(backend, monkeypatch):
    """Uninitialised memory, poisoned: every element of out, lse and the gradients must be written."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, _real=real, **kwargs):
            x = _real(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
    real_new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: real_new_empty(self, *args, **kwargs).fill_(torch.nan)
    )
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (torch.randn(2, 6, 37, 8).to(dtype).requires_grad_() for _ in range(3))
        for args in (((8, 16), (1, 4)), (16, 7), ((5, 9), (3, 2))):
            out, lse = dilated_attention(q, k, v, *args, return_lse=True, backend=backend)
            grads = torch.autograd.grad(out.float().sum(), (q, k, v))
            assert not any(x.isnan().any() for x in (out, lse, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same(backend):
    base = [torch.randn(2, 4, 24, 8, dtype=torch.float64) for _ in range(3)]
    args = ((6, 12), (2, 3))
    expected = dilated_attention(*base, *args, backend=backend)
    wide = [torch.randn(2, 4, 24, 16, dtype=torch.float64) for _ in range(3)]
    variants = {
        "last dimension transposed": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in base],
        "tokens reversed in memory": [x.flip(2).contiguous().flip(2) for x in base],
        "every second channel": [
            w.index_copy(-1, torch.arange(0, 16, 2), x)[..., ::2] for w, x in zip(wide, base, strict=True)
        ],
        "batch last": [x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for x in base],
    }
    for name, inputs in variants.items():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*inputs, *args, backend=backend)
        assert relative_error(out, expected) < 1e-12, name
        # An expanded gradient has strides of zero.
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert grad.isfinite().all(), name
    expanded = base[0][:1, :1].expand(2, 4, 24, 8)
    out = dilated_attention(expanded, *base[1:], *args, backend=backend)
    assert relative_error(out, dilated_attention(expanded.contiguous(), *base[1:], *args, backend=backend)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 4, 0, 8)])
def test_empty_inputs_give_empty_results(backend, shape):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    mask = torch.zeros(shape[0], shape[2], dtype=torch.bool)
    out, lse = dilated_attention(q, k, v, (4, 8), (1, 2), key_padding_mask=mask, return_lse=True, backend=backend)
    assert out.shape == shape and lse.shape == shape[:-1]
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [torch.Size(shape)] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 48, 128, 256])
def test_head_dimensions(backend, head_dim):
    problem = Problem(1, 1, 2, 70, head_dim, ((16, 1), (64, 4)), True, "interleaved", None, True, 11)
    check(problem, backend, 1e-10)


def test_scale_is_used():
    q, k, v = (torch.randn(1, 2, 16, 4, dtype=torch.float64) for _ in range(3))
    for backend in BACKENDS:
        out = dilated_attention(q, k, v, 8, 2, scale=1.7, backend=backend)
        assert relative_error(out, dense_attention(q, k, v, (8,), (2,), scale=1.7)[0]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", [None, 0.3])
@pytest.mark.parametrize("scale", [-1.7, -1e-60, 0.0, 1e-60])
def test_every_finite_scale_is_exact(backend, is_causal, padding, scale):
    """torch's CPU kernel writes -inf into causal scores before it multiplies them by the scale."""
    problem = Problem(2, 2, 2, 40, 4, ((6, 1), (20, 3)), is_causal, "interleaved", padding, True, 12)
    options = problem.options() | {"scale": scale}
    double = tuple(x.detach().requires_grad_() for x in problem.tensors())
    out, lse = dense_attention(*double, problem.segment_lengths, problem.dilation_rates, **options)
    expected = out, lse, *backward(out, lse, double, problem.upstream())
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in double)
        out, lse = dilated_attention(
            *inputs, problem.segment_lengths, problem.dilation_rates, return_lse=True, backend=backend, **options
        )
        got = out, lse, *backward(out, lse, inputs, problem.upstream())
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.isinf(), other.isinf())
            finite = ~other.isinf()
            assert relative_error(one[finite], other[finite]) < tolerance


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "rates", "said"),
    [
        (
            (2047, 4097, 32769),
            (6, 7, 11),
            r"p mod 4097 mod 7 in \{4, 5, 6\} to no head \(9.1% of the first 1,048,576\)",
        ),
        ((10**12,), (10**12,), r"p mod 1000000000000 .* to no head \(100.0% of the first 1,048,576\)"),
        ((10**12, 10**12 - 1), (1, 10**12 - 1), None),
    ],
)
def test_a_warning_that_cannot_count_all_positions_stops_no_call(backend, lengths, rates, said):
    problem = Problem(1, 4, 1, 30, 4, tuple(zip(lengths, rates, strict=True)), True, "interleaved", None, True, 13)
    warn_uncovered.cache_clear()
    with nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        check(problem, backend, 1e-10)


def test_runs_are_bit_identical():
    q, k, v = (torch.randn(1, 4, 300, 16, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        out = dilated_attention(q, k, v, (64, 256), (1, 4), is_causal=True)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 1, 3, 1), (2, 1, 1, 2), (1, 2, 3, 2)])
@pytest.mark.parametrize("stride", [1, 5])
def test_strides_of_dimensions_of_size_1_mean_nothing(backend, shape, stride):
    """Such a tensor is contiguous for torch, and may also be taken for channels_last."""
    generator = torch.Generator().manual_seed(4)

    def draw(*size: int) -> torch.Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        return x.as_strided(size, [stride if n == 1 else step for n, step in zip(size, x.stride(), strict=True)])

    inputs = tuple(draw(*shape).requires_grad_() for _ in range(3))
    upstream = draw(*shape), draw(*shape[:3])
    out, lse = dilated_attention(*inputs, (2, 4), (1, 2), is_causal=True, return_lse=True, backend=backend)
    expected_out, expected_lse = dense_attention(*inputs, (2, 4), (1, 2), is_causal=True)
    assert relative_error(out, expected_out) < 1e-10
    for weights in (upstream, (torch.zeros(shape, dtype=torch.float64), upstream[1])):
        got = torch.autograd.grad((out, lse), inputs, weights, retain_graph=True)
        expected = torch.autograd.grad((expected_out, expected_lse), inputs, weights, retain_graph=True)
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 1e-10
