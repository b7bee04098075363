"""CUDA tensors give right answers: the oracle grid on the device. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from oracle import dense_attention
from patterns import Problem, backward, problems, relative_error

import longnet
from longnet import dilated_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]


def on_device(problem: Problem):
    inputs = tuple(x.detach().cuda().requires_grad_() for x in problem.tensors())
    options = problem.options()
    if options["key_padding_mask"] is not None:
        options["key_padding_mask"] = options["key_padding_mask"].cuda()
    out, lse = dilated_attention(*inputs, problem.segment_lengths, problem.dilation_rates, return_lse=True, **options)
    upstream = tuple(x.cuda() for x in problem.upstream())
    return [x.cpu() for x in (out, lse, *backward(out, lse, inputs, upstream))]


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_float64_equals_the_definition(problem):
    out, lse, *grads = on_device(problem)
    expected_out, expected_lse, expected_grads = problem.oracle()
    finite = ~expected_lse.isinf()
    assert torch.equal(lse.isfinite(), finite)
    assert relative_error(out, expected_out) < 1e-10
    assert relative_error(lse[finite], expected_lse[finite]) < 1e-10
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected) < 1e-10


@pytest.mark.parametrize("is_causal", [False, True])
def test_float32(is_causal):
    problem = Problem(
        2, 2, 2, 700, 32, ((64, 1), (256, 3), (600, 4)), is_causal, "interleaved", 0.2, True, 5, torch.float32
    )
    out, _, *grads = on_device(problem)
    expected_out, _, expected_grads = problem.oracle()
    assert relative_error(out, expected_out) < 1e-5
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_torchs_own_error(dtype):
    problem = Problem(1, 4, 1, 520, 64, ((64, 1), (512, 4)), True, "interleaved", None, True, 3, dtype)
    inputs = [x.detach().cuda() for x in problem.tensors()]
    double = [x.double() for x in inputs]
    out = dilated_attention(*inputs, problem.segment_lengths, problem.dilation_rates, is_causal=True)
    expected = dense_attention(
        *(x.cpu() for x in double), problem.segment_lengths, problem.dilation_rates, is_causal=True
    )[0]
    attend = torch.nn.functional.scaled_dot_product_attention
    allowed = relative_error(attend(*inputs, is_causal=True).cpu(), attend(*double, is_causal=True).cpu())
    assert relative_error(out.cpu(), expected) <= 2 * allowed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rel_pos_bias": True},
        {"use_xpos": True, "use_rel_pos_bias": True, "qk_norm": True, "kv_heads": 2},
    ],
)
def test_the_module_gives_what_it_gives_on_the_cpu(options):
    torch.manual_seed(0)
    module = longnet.DilatedAttention(32, 4, (1, 2), (16, 64), causal=True, dtype=torch.float64, **options)
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    upstream = torch.randn_like(x)
    expected = module(x)
    expected_grads = torch.autograd.grad(expected, tuple(module.parameters()), upstream)
    module.cuda()
    out = module(x.cuda())
    torch.testing.assert_close(out.cpu(), expected)
    grads = torch.autograd.grad(out, tuple(module.parameters()), upstream.cuda())
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.cpu(), want)


def test_the_language_model_trains_under_autocast():
    model = longnet.LongNetLM(longnet.LongNetConfig.preset("nano"), device="cuda")
    tokens = torch.randint(0, 256, (2, 300), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    out = model.generate(tokens[:1, :8], 4, seed=0)
    assert out.shape == (1, 12)
