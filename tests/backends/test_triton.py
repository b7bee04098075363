"""The Triton backend in Triton's interpreter, against the dense float64 oracle. On a GPU: ``tests/gpu``."""

from __future__ import annotations

import importlib.util

import interpreted
import pytest
import torch
from calls import call_on
from oracle import dense_attention
from patterns import Problem, relative_error
from torch.utils.checkpoint import checkpoint

import longnet
from longnet import dilated_attention
from longnet.attention.backends import select_backend
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.backends.triton import bias as bias_launches
from longnet.attention.call import AttentionSpec
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
        reason="needs triton, and no GPU: with one, kernels are compiled",
    ),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]
NEST = ((16, 1), (32, 2), (64, 4))
SMALL = ((4, 8), (1, 2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What long sequences do with large blocks, short ones do with small blocks."""
    interpreted.hasten()
    monkeypatch.setattr(triton_flash, "blocks_for", lambda *_: triton_flash.Blocks(16, 16, 4, 1))
    monkeypatch.setattr(triton_flash, "LEAST_ROWS", 1)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def tensors(length: int = 9, heads: int = 2, dim: int = 8, batch: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(draw(batch, heads, length, dim, seed=seed) for seed in range(3))


def attend(problem: Problem, scale: float | None = None, bias: torch.Tensor | None = None, backend: str = "triton"):
    """out, lse and the gradients of everything, with gradients flowing into both."""
    inputs = [*problem.tensors(), *([] if bias is None else [bias])]
    pattern = Pattern.parse(problem.segment_lengths, problem.dilation_rates, problem.head_offsets)
    out, lse = pattern_attention(
        *inputs[:3], pattern, is_causal=problem.is_causal, scale=scale, key_padding_mask=problem.mask(),
        distance_bias=bias, return_lse=True, backend=backend,
    )  # fmt: skip
    return out, lse, *torch.autograd.grad((out, lse), inputs, upstream(problem, out, lse))


def upstream(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Into rows without keys flow gradients too: they must go nowhere."""
    return tuple(x.to(like.dtype) for x, like in zip(problem.upstream(), (out, lse), strict=True))


def definition(problem: Problem, scale: float | None = None, bias: torch.Tensor | None = None):
    """What ``attend`` gives, by the oracle."""
    inputs = [x.detach().double().requires_grad_() for x in (*problem.tensors(), *([] if bias is None else [bias]))]
    score_bias = None
    if bias is not None:
        position, centre = torch.arange(problem.length), bias.shape[1] // 2
        # Distances beyond the table are longer than any segment.
        score_bias = inputs[3][:, (position[None, :] - position[:, None]).clamp(-centre, centre) + centre]
    out, lse = dense_attention(
        *inputs[:3], problem.segment_lengths, problem.dilation_rates, scale=scale, score_bias=score_bias,
        **problem.options(),
    )  # fmt: skip
    grad_out, grad_lse = upstream(problem, out, lse)
    grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0)
    return out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))


CASES = {
    "a nest": (Problem(1, 3, 1, 64, 16, NEST, True, "interleaved", None, False, 1), None),
    "a nest, not causal, grouped heads, padded": (
        Problem(2, 1, 2, 34, 8, ((8, 1), (16, 2), (32, 4)), False, "interleaved", 0.3, True, 2), 0.3,
    ),
    "blocked offsets, negative scale": (
        Problem(1, 2, 2, 41, 16, ((16, 1), (32, 2)), True, "blocked", 0.2, True, 3), -0.4,
    ),
    "nothing nests": (Problem(1, 2, 1, 37, 8, ((7, 1), (30, 2)), True, "interleaved", None, True, 4), None),
    "rows that no branch selects": (
        Problem(1, 4, 1, 50, 8, ((20, 3), (33, 7)), False, "blocked", 0.6, False, 5), None,
    ),
    "segments longer than the sequence": (
        Problem(1, 4, 1, 30, 8, ((64, 2), (128, 4)), True, "interleaved", None, True, 6), None,
    ),
    "several branches of rate 1": (
        Problem(1, 2, 1, 50, 8, ((12, 1), (24, 1), (24, 2)), False, "interleaved", 0.2, True, 7), None,
    ),
    "the same branch twice, scale 0": (
        Problem(1, 2, 1, 33, 8, ((16, 2), (16, 2)), True, "interleaved", None, True, 8), 0.0,
    ),
    "not causal, negative scale": (
        Problem(1, 2, 1, 33, 8, ((16, 1), (32, 2)), False, "interleaved", 0.2, True, 14), -0.4,
    ),
    "two nests of two branches": (
        Problem(1, 2, 1, 50, 8, ((12, 1), (16, 1), (24, 2), (32, 2)), True, "interleaved", None, True, 9), None,
    ),
    "lengths that are no multiple of the rate": (
        Problem(1, 5, 1, 47, 8, ((13, 5),), True, "interleaved", 0.2, True, 10), None,
    ),
    "head dimension 24": (Problem(1, 2, 1, 20, 24, ((8, 1), (16, 2)), True, "interleaved", 0.2, True, 11), None),
    "head dimension 48": (Problem(1, 1, 2, 20, 48, ((8, 1), (16, 2)), False, "interleaved", None, True, 12), None),
    "one token": (Problem(2, 2, 1, 1, 8, ((8, 1), (16, 2)), True, "interleaved", None, True, 13), None),
}  # fmt: skip


def check(got, expected) -> None:
    assert torch.equal(got[1].isinf(), expected[1].isinf())
    finite = ~expected[1].isinf()
    assert relative_error(got[0], expected[0]) < 1e-5
    assert relative_error(got[1][finite], expected[1][finite]) < 1e-5
    for grad, want in zip(got[2:], expected[2:], strict=True):
        assert not grad.isnan().any()
        assert relative_error(grad, want) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_definition(name):
    problem, scale = CASES[name]
    problem = Problem(**{**problem.__dict__, "dtype": torch.float32})
    check(attend(problem, scale), definition(problem, scale))


def test_the_cases_nest_as_they_say():
    def nests(name):
        problem = CASES[name][0]
        pattern = Pattern.parse(problem.segment_lengths, problem.dilation_rates, problem.head_offsets)
        return [len(nest.branches) for nest in make_nests(pattern, problem.heads, 16, 1)]

    assert (
        nests("a nest") == [3] and nests("nothing nests") == [1, 1] and nests("blocked offsets, negative scale") == [2]
    )
    assert nests("several branches of rate 1") == [3] and nests("two nests of two branches") == [2, 2]
    assert nests("the same branch twice, scale 0") == [2] and nests("rows that no branch selects") == [1, 1]


@pytest.mark.parametrize("is_causal", [False, True])
def test_float16_is_within_twice_torchs_own_error(is_causal):
    """The rule of the FlashAttention test suite: at most twice the error of torch's attention in the same type."""
    problem = Problem(1, 2, 1, 64, 16, NEST, is_causal, "interleaved", None, True, 3, torch.float16)
    out, _, *grads = attend(problem)
    expected_out, _, *expected = definition(problem)
    inputs, grad_out = problem.tensors(), problem.upstream()[0]

    def torchs(dtype):
        x = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=is_causal)
        return out, *torch.autograd.grad(out, x, grad_out.to(dtype))

    allowed = [relative_error(a, b) for a, b in zip(torchs(torch.float16), torchs(torch.float64), strict=True)]
    for got, want, limit in zip((out, *grads), (expected_out, *expected), allowed, strict=True):
        assert got.dtype == torch.float16
        assert relative_error(got, want) <= 2 * limit


BIASED = {
    "a nest": Problem(1, 2, 1, 64, 8, NEST, True, "interleaved", None, True, 1, torch.float32),
    "not causal, grouped heads, padded": Problem(
        2, 1, 2, 43, 8, ((16, 1), (32, 2)), False, "interleaved", 0.3, True, 2, torch.float32
    ),
    "rows that no branch selects": Problem(
        2, 4, 1, 45, 8, ((20, 3), (33, 7)), False, "blocked", 0.3, False, 5, torch.float32
    ),
    "several branches of rate 1": Problem(
        1, 1, 1, 50, 8, ((12, 1), (24, 1), (24, 2)), True, "interleaved", None, True, 7, torch.float32
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_the_relative_bias_and_its_gradient(name, monkeypatch):
    # Segments shared out among many programs, or all done by one.
    monkeypatch.setattr(bias_launches, "PROGRAMS", 1 if name == "a nest" else 2048)
    problem = BIASED[name]
    reach = max(problem.segment_lengths)
    bias = draw(problem.heads, 2 * reach + 5, seed=9)
    check(attend(problem, -0.4, bias), definition(problem, -0.4, bias))


def test_a_bias_in_half_precision_has_a_gradient_in_half_precision():
    problem = Problem(1, 2, 1, 20, 8, ((8, 1), (16, 2)), True, "interleaved", None, True, 1, torch.float16)
    bias = draw(2, 31, dtype=torch.float16)
    got, expected = attend(problem, None, bias)[-1], definition(problem, None, bias)[-1]
    assert got.dtype == torch.float16
    assert relative_error(got, expected) < 2e-3


def test_the_module_with_its_relative_bias():
    torch.manual_seed(0)
    options = dict(causal=True, use_xpos=True, use_rel_pos_bias=True, qk_norm=True, kv_heads=1)
    modules = [
        longnet.DilatedAttention(16, 2, (1, 2), (8, 16), backend=name, **options) for name in ("triton", "portable")
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    x, upstream = torch.randn(1, 21, 16), torch.randn(1, 21, 16)
    mask = torch.arange(21)[None] >= 18
    outs = [module(x, mask) for module in modules]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(o, tuple(m.parameters()), upstream) for o, m in zip(outs, modules, strict=True)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_padded_keys_hold_never_matters():
    q, k, v = tensors(24)
    bias = draw(2, 63)
    mask = (torch.arange(24) % 5 == 1)[None] | (torch.arange(24) < 3)[None]
    poison = torch.where(mask[:, None, :, None], torch.nan, 0.0)
    results = []
    for key, value in ((k, v), (k + poison, v + poison)):
        out, lse = pattern_attention(
            q, key, value, Pattern.parse((8, 16), (1, 2)), is_causal=True, key_padding_mask=mask, distance_bias=bias,
            return_lse=True, backend="triton",
        )  # fmt: skip
        assert not out[:, :, :3].any() and (lse[:, :, :3] == -torch.inf).all()
        results.append((out, lse, *torch.autograd.grad(out.sum(), (q, k, v, bias))))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert not results[0][2][:, :, :3].any()
    for grad in results[0][3:5]:
        assert not grad.transpose(1, 2)[mask].any()


def test_outputs_are_written_everywhere(monkeypatch):
    """Uninitialised memory, poisoned: every element of out, lse and the gradients must be written."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, _real=real, **options):
            x = _real(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, poisoned)
    for branches in (((8, 1), (16, 2)), ((16, 7),), ((5, 3), (9, 2))):
        for group in (1, 2):
            problem = Problem(1, 2 // group, group, 21, 8, branches, True, "interleaved", 0.3, True, 1, torch.float32)
            out, lse, *grads = attend(problem, None, draw(2, 31))
            assert not any(x.isnan().any() for x in (out, lse, *grads))


def test_any_strides_give_the_same():
    base = tensors(19)
    expected = dilated_attention(*base, *SMALL, backend="triton")
    expected_grads = torch.autograd.grad(expected, base, torch.ones_like(expected))
    variants = {
        "tokens before heads": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in base],
        "last dimension transposed": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in base],
        "every second channel": [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in base],
    }
    for name, inputs in variants.items():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*inputs, *SMALL, backend="triton")
        assert relative_error(out, expected) < 1e-6, name
        # An expanded gradient has strides of zero.
        for grad, want in zip(torch.autograd.grad(out.sum(), inputs), expected_grads, strict=True):
            assert relative_error(grad, want) < 1e-6, name
    one = base[0][:, :1].expand(1, 2, 19, 8)
    out, expected = (dilated_attention(q, *base[1:], *SMALL, backend="triton") for q in (one, one.contiguous()))
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("at", [0, 15, 16, 22])
def test_causal_outputs_are_bit_identical_whatever_comes_later(at):
    before = [x.detach() for x in tensors(24)]
    after = [x.clone() for x in before]
    for x in after:
        x[:, :, at + 1 :] = 100.0
    first, second = (dilated_attention(*x, (8, 16), (1, 2), is_causal=True, backend="triton") for x in (before, after))
    assert torch.equal(first[:, :, : at + 1], second[:, :, : at + 1])


def test_runs_are_bit_identical():
    problem, bias = BIASED["several branches of rate 1"], draw(1, 63)
    assert all(torch.equal(a, b) for a, b in zip(attend(problem, 0.3, bias), attend(problem, 0.3, bias), strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (2, 2, 0, 8)])
def test_empty_inputs_give_empty_results(shape):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = draw(2, 15)
    out, lse = pattern_attention(q, k, v, Pattern.parse(*SMALL), distance_bias=bias, return_lse=True, backend="triton")
    assert out.shape == shape and lse.shape == shape[:-1]
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, bias))
    assert [grad.shape for grad in grads[:3]] == [torch.Size(shape)] * 3
    assert not grads[3].any()


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full):
    q, k, v = tensors(5)
    mask = torch.arange(5)[None] == 3 if full else None
    bias = draw(2, 15) if full else None
    settings = AttentionSpec(Pattern.parse((4, 8), (1, 2)), True, 0.3).encode()
    forward, backward = torch.ops.longnet.triton.default, torch.ops.longnet.triton_backward.default
    torch.library.opcheck(forward, (q, k, v, mask, None, bias, *settings))
    out, lse = (x.detach() for x in forward(q, k, v, mask, None, bias, *settings))
    plain = [None if x is None else x.detach() for x in (q, k, v, mask, None, bias)]
    args = (torch.ones_like(out), torch.ones_like(lse) if full else None, *plain, out, lse, *settings)
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compiles_to_one_graph_with_gradients():
    def loss(q, k, v):
        return dilated_attention(q * 2, k, v, *SMALL, is_causal=True, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (9, 13):
        inputs = tensors(length)
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_exports_with_a_dynamic_length():
    module = longnet.DilatedAttention(16, 2, (1, 2), (4, 8), 0.1, True, True, True, backend="triton").eval()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(1, 9, 16),), dynamic_shapes=({1: length},))
    for n in (5, 17):
        x = torch.randn(1, n, 16)
        torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_casts_as_torchs_attention_does():
    inputs = tensors()
    with torch.autocast("cpu", dtype=torch.float16):
        out = dilated_attention(*inputs, *SMALL, backend="triton")
    assert torch.equal(out, dilated_attention(*(x.half() for x in inputs), *SMALL, backend="triton"))
    assert [grad.dtype for grad in torch.autograd.grad(out.float().sum(), inputs)] == [torch.float32] * 3


def test_checkpointing_gives_the_same_gradients():
    inputs = tensors()

    def attend(q, k, v):
        return dilated_attention(q, k, v, *SMALL, is_causal=True, backend="triton")

    plain = torch.autograd.grad(attend(*inputs).sum(), inputs)
    saved = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_a_second_derivative_is_refused_clearly():
    inputs = tensors()
    out = dilated_attention(*inputs, *SMALL, backend="triton")
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"longnet::triton_backward\) has no second derivative"):
        torch.autograd.grad(first[0].sum(), inputs)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(segment_lengths=(8,)),
        dict(key=torch.zeros(1, 2, 9, 4)),
        dict(value=torch.zeros(1, 2, 9, 8, dtype=torch.float64)),
        dict(key_padding_mask=torch.zeros(1, 8, dtype=torch.bool)),
        dict(scale=float("inf")),
    ],
)
def test_bad_input_gets_the_errors_of_every_backend(arguments):
    said = []
    for backend in ("triton", "portable"):
        q, k, v = tensors()
        call = dict(query=q, key=k, value=v, segment_lengths=(4, 8), dilation_rates=(1, 2), backend=backend)
        with pytest.raises(ValueError, match="expected|finite") as raised:
            dilated_attention(**{**call, **arguments})
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_what_it_cannot_run_is_said():
    with pytest.raises(ValueError, match="takes torch.float32, torch.bfloat16, torch.float16, not torch.float64"):
        dilated_attention(*(x.double() for x in tensors()), *SMALL, backend="triton")
    with pytest.raises(ValueError, match="head dimensions up to 256, not 257"):
        dilated_attention(*tensors(dim=257), *SMALL, backend="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"it runs on cuda tensors \(cpu ones with TRITON_INTERPRET=1\), not cpu"):
        dilated_attention(*tensors(), *SMALL, backend="triton")


def test_a_missing_triton_is_said_and_passed_over(monkeypatch):
    monkeypatch.setattr(triton_flash, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="backend='triton' cannot run these inputs: triton: triton is not installed"):
        dilated_attention(*tensors(), *SMALL, backend="triton")
    assert select_backend("auto", call_on("cuda", torch.bfloat16)).name == "portable"


@pytest.mark.parametrize("has_bias", [False, True])
def test_automatic_choice(has_bias):
    """The interpreter is never chosen for a user; a GPU gets the kernels, with a relative bias too."""
    assert select_backend("auto", call_on("cpu", torch.float32, has_bias)).name != "triton"
    assert select_backend("auto", call_on("cuda", torch.bfloat16, has_bias)).name == "triton"
