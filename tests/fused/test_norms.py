"""Norms and the projections that read them, against float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import interpreted
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longnet.models import LongNetConfig
from longnet.models.layers import Block, FeedForward
from longnet.nn import Norm, fits, normed_linear, residual_normed_linear
from longnet.nn import norm_linear as joined
from longnet.nn import projections as normed
from longnet.nn.norm import make_norm
from longnet.nn.norm_operators import column_sums, few_rows, is_few, norm_backward, norm_forward

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a result that is rounded a few times, by dtype.
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter() -> None:
    interpreted.hasten()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linears_of(channels: int, widths: Sequence[int], biased: bool, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    return [
        (draw(d, channels, seed=seed + k).float() / channels**0.5, draw(d, seed=seed + k).float() if biased else None)
        for k, d in enumerate(widths)
    ]


Leaves = list[Tensor]


def leaves_of(x: Tensor, norm: Norm, linears: Sequence[tuple[Tensor, Tensor | None]]) -> Leaves:
    parts = (x, norm.weight, norm.bias, *(part for linear in linears for part in linear))
    return [one.to(DEVICE).requires_grad_() for one in parts if one is not None]


def rebuilt(leaves: Leaves, norm: Norm, biased: bool) -> tuple[Norm, list[tuple[Tensor, Tensor | None]]]:
    """The leaves as arguments again."""
    rest = iter(leaves[2:])
    norm = norm._replace(weight=leaves[1], bias=None if norm.bias is None else next(rest))
    linears = [(weight, next(rest) if biased else None) for weight in rest]
    return norm, linears


def plain(x: Tensor, norm: Norm, linears: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """The definition."""
    y, about = F.gelu(x) if norm.gelu else x, (x.shape[-1:], norm.weight)
    y = F.rms_norm(y, *about, norm.eps) if norm.bias is None else F.layer_norm(y, *about, norm.bias, norm.eps)
    return [F.linear(y, *linear) for linear in linears]


@settings(max_examples=30)
@given(
    has_bias=st.booleans(),
    channels=st.sampled_from([256, 512, 768, 1024, 1536]),
    shape=st.sampled_from([(1,), (3,), (2, 5), (1, 1, 4)]),
    # Of a width that has no kernel for sums of columns, and of several widths at once.
    widths=st.sampled_from([(256,), (40,), (256, 256, 256), (40, 512)]),
    dtype=st.sampled_from(list(ROUNDING)),
    kind=st.sampled_from(["gelu", "half", "wide", "residual"]),
    weights=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_results_and_gradients(has_bias, channels, shape, widths, dtype, kind, weights, biased, seed):
    x = (draw(*shape, channels, seed=seed) * 3.0).to(dtype if kind in ("gelu", "half") else torch.float32)
    weight, bias = draw(channels, seed=seed + 1).to(weights), draw(channels, seed=seed + 2).to(weights)
    norm = Norm(weight, bias if has_bias else None, 1e-5, kind == "gelu")
    linears = linears_of(channels, widths, biased, seed + 3)
    leaves = leaves_of(x, norm, linears)
    arguments = rebuilt(leaves, norm, biased)
    upstream = [draw(*shape, width, seed=seed + 50 + k) for k, width in enumerate(widths)]
    beside = draw(*shape, channels, seed=seed + 99)
    if kind == "residual":
        same, outs = residual_normed_linear(leaves[0], *arguments, dtype)
        assert torch.equal(same, leaves[0])
        total = (same * beside.to(same)).sum()
    else:
        outs = normed_linear(leaves[0], *arguments, dtype)
        total = torch.zeros((), device=DEVICE)
    assert all(out.dtype == dtype for out in outs)
    with torch.no_grad():
        alone = normed_linear(leaves[0], *arguments, dtype)
    if not is_few(x):
        assert all(torch.equal(out, other) for out, other in zip(outs, alone, strict=True))
    total = total + sum((out.float() * grad.to(out).float()).sum() for out, grad in zip(outs, upstream, strict=True))
    found = [*outs, *torch.autograd.grad(total, leaves)]
    exact = [one.detach().double().cpu().requires_grad_() for one in leaves]
    expected = plain(exact[0], *rebuilt(exact, norm, biased))
    wanted = sum((out * grad.to(dtype).double()).sum() for out, grad in zip(expected, upstream, strict=True))
    if kind == "residual":
        wanted = wanted + (exact[0] * beside.float().double()).sum()
    truth = [*expected, *torch.autograd.grad(wanted, exact)]
    for number, (got, want) in enumerate(zip([*alone, *found], [*expected, *truth], strict=True)):
        allowed = ROUNDING[torch.bfloat16] if got.dtype == torch.bfloat16 else ROUNDING[dtype]
        assert (got.double().cpu() - want).norm() <= allowed * want.norm(), number


@pytest.mark.parametrize("channels", [256, 768, 3072])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_are_one_launch(has_bias: bool, gelu: bool, channels: int) -> None:
    """Of matrices whose rows are no multiple of a program's, in float32: rounded nowhere, with nothing left unwritten."""
    torch.use_deterministic_algorithms(True)
    try:
        x = 3.0 * draw(1, 3, channels)
        weight, bias = draw(channels, seed=1), draw(channels, seed=2) if has_bias else None
        matrices = [draw(rows, channels, seed=3 + rows) / channels**0.5 for rows in (9, 1, 32)]
        biases = [draw(len(matrix), seed=4) for matrix in matrices]
        single = [
            [None if one is None else one.float().to(DEVICE) for one in some]
            for some in ([x, weight, bias], matrices, biases)
        ]
        assert is_few(single[0][0]) and not is_few(x.expand(2, -1, -1)) and not is_few(x[:, :0])
        for given, added in ((single[2], biases), ([], [None] * 3)):
            outs = few_rows(*single[0], 1e-5, gelu, single[1], given)
            wanted = plain(x, Norm(weight, bias, 1e-5, gelu), list(zip(matrices, added, strict=True)))
            for out, want in zip(outs, wanted, strict=True):
                assert out.shape == want.shape and out.dtype == torch.float32
                torch.testing.assert_close(out.double().cpu(), want, rtol=1e-5, atol=2e-6)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels", [256, 768, 1536])
@pytest.mark.parametrize(
    ("gelu", "count", "wide"), [(True, 1, False), (False, 1, False), (False, 1, True), (False, 3, True)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_backward_pass_by_itself(has_bias: bool, gelu: bool, count: int, wide: bool, channels: int) -> None:
    """What is float32 is right to float32, what is float16 is rounded once, and nothing is left unwritten."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=DEVICE).isnan().all(), "uninitialised memory is not poisoned"
        x = (3.0 * draw(2, 5, channels)).to(torch.float32 if wide else torch.float16)
        weight, bias = draw(channels, seed=1).float(), draw(channels, seed=2).float() if has_bias else None
        grads = [draw(2, 5, channels, seed=10 + k).half() for k in range(count)]
        beside = draw(2, 5, channels, seed=3).float() if wide else None
        there = [None if one is None else one.to(DEVICE) for one in (x, weight, bias, beside)]
        grad_x, again, sums = norm_backward([one.to(DEVICE) for one in grads], *there, 1e-5, gelu)
        forwards = [norm_forward(*there[:3], 1e-5, gelu, dtype) for dtype in (torch.float16, torch.float32)]
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [one.double().requires_grad_() for one in (x, weight, bias) if one is not None]
    norm = Norm(exact[1], exact[2] if has_bias else None, 1e-5, gelu)
    (normed_x,) = plain(exact[0], norm, [(torch.eye(channels).double(), None)])
    wanted = list(torch.autograd.grad(normed_x, exact, sum(one.double() for one in grads)))
    if beside is not None:
        wanted[0] = wanted[0] + beside.double()
    pairs = list(zip((grad_x, *sums), wanted, strict=True))
    pairs += [(one, normed_x) for one in (again, *forwards)]
    for got, want in pairs:
        allowed = 1e-6 if got.dtype == torch.float32 else 5e-4
        assert (got.double().cpu() - want).norm() <= allowed * want.norm()


def test_far_from_zero_and_at_it():
    # Tails of the normal distribution, zeros of both signs, and the largest float16.
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 0.5, -0.5, 6.0, -6.0, 300.0, -300.0, 65504.0, -65504.0] * 64)[None]
    for half in (x.half(), x[:, :256].half() / 1000):
        channels = half.shape[-1]
        norm = Norm(torch.ones(channels), torch.zeros(channels), 1e-5, gelu=True)
        leaves = leaves_of(half, norm, [(torch.eye(channels), None)])
        (out,) = normed_linear(leaves[0], *rebuilt(leaves, norm, False), torch.half)
        upstream = draw(1, channels).half()
        grads = torch.autograd.grad(out, leaves[:3], upstream.to(DEVICE))
        exact = [one.detach().double().cpu().requires_grad_() for one in leaves]
        (expected,) = plain(exact[0], *rebuilt(exact, norm, False))
        wanted = torch.autograd.grad(expected, exact[:3], upstream.double())
        for got, want in zip((out, *grads), (expected, *wanted), strict=True):
            assert got.isfinite().all() and (got.double().cpu() - want).norm() <= 5e-4 * want.norm()


def test_a_row_far_from_zero_keeps_its_variance():
    # The sum of squares minus the square of the mean would lose it.
    x = (100.0 + 0.1 * draw(4, 256)).float().to(DEVICE).requires_grad_()
    norm = Norm(torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE), 1e-5)
    upstream = draw(4, 256, seed=1).half()
    (out,) = normed_linear(x, norm, [(torch.eye(256, device=DEVICE), None)], torch.half)
    (grad,) = torch.autograd.grad(out, x, upstream.to(DEVICE))
    exact = x.detach().double().cpu().requires_grad_()
    same = Norm(torch.ones(256).double(), torch.zeros(256).double(), 1e-5)
    (expected,) = plain(exact, same, [(torch.eye(256).double(), None)])
    (wanted,) = torch.autograd.grad(expected, exact, upstream.double())
    assert (grad.double().cpu() - wanted).norm() <= 2e-3 * wanted.norm()


def test_sums_of_columns():
    for shapes in ([(7, 256)], [(300, 256), (300, 256), (300, 256)], [(2, 33, 512), (1, 40)], [(0, 256)], []):
        tensors = [draw(*shape, seed=k).half().to(DEVICE) for k, shape in enumerate(shapes)]
        found = column_sums(tensors)
        assert len(found) == len(tensors)
        for one, got in zip(tensors, found, strict=True):
            want = one.double().flatten(0, -2).sum(0)
            assert got.dtype == torch.float32 and (got - want).norm() <= 1e-5 * want.norm() + 1e-12


def test_strides_no_rows_and_frozen_weights():
    x, weight, bias = draw(4, 256, 3).half().to(DEVICE), draw(256).float().to(DEVICE), draw(256).float().to(DEVICE)
    across = x.transpose(1, 2)
    rest = weight, bias, 1e-5, True, torch.half
    assert torch.equal(norm_forward(across, *rest), norm_forward(across.contiguous(), *rest))
    norm, linears = Norm(weight, bias, 1e-5, gelu=True), [(draw(256, 256).float().to(DEVICE), bias)]
    one, other = across.detach().requires_grad_(), across.detach().contiguous().requires_grad_()
    for leaf in (one, other):
        normed_linear(leaf, norm, linears, torch.half)[0].float().square().sum().backward()
    assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    none = x.new_empty(0, 256).requires_grad_()
    (out,) = normed_linear(none, norm, linears, torch.half)
    assert out.shape == (0, 256) and torch.autograd.grad(out.sum(), none)[0].shape == (0, 256)


def test_what_nobody_wants_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3, 256).half().to(DEVICE).requires_grad_()
    norm = Norm(torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE), 1e-5)
    frozen, weight, bias = (draw(*shape).float().to(DEVICE) for shape in ((256, 256), (256, 256), (256,)))
    weight.requires_grad_()
    sums: list[int] = []
    monkeypatch.setattr(joined, "column_sums", lambda tensors: (sums.append(len(tensors)), column_sums(tensors))[1])
    outs = normed_linear(x, norm, [(frozen, bias), (weight, bias)], torch.half)
    torch.stack(outs).float().sum().backward()
    assert sums == [0] and frozen.grad is None and bias.grad is None
    assert weight.grad is not None and x.grad is not None


def test_no_second_derivative():
    x = draw(2, 256).half().to(DEVICE).requires_grad_()
    norm = Norm(torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE), 1e-5, gelu=True)
    (out,) = normed_linear(x, norm, [(torch.eye(256, device=DEVICE), None)], torch.half)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_fits():
    if DEVICE == "cpu":
        assert not fits(torch.device("cpu"), torch.half, 3072)
        return
    of = partial(fits, torch.device("cuda"))
    assert all(of(torch.half, c) for c in (256, 768, 3072, 4096, 6144, 8192))
    assert not any(of(torch.half, c) for c in (64, 400, 5120, 16384))
    assert not of(torch.float32, 3072)


class Adapter(nn.Module):
    """A projection of another class, as adapters are, with its parameters elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(1024, 256)

    def forward(self, y: Tensor) -> Tensor:
        return self.inside(y)


def hooked(module: nn.Linear) -> nn.Linear:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("change", "joined"),
    [
        (lambda block: None, True),
        (lambda block: setattr(block.feed_forward, "sub_norm", make_norm("rms", 1024)), True),
        (lambda block: setattr(block.feed_forward, "sub_norm", make_norm("rms", 1024, eps=None)), False),
        (lambda block: setattr(block.feed_forward, "fc2", Adapter()), False),
        (lambda block: hooked(block.feed_forward.fc2), False),
        (lambda block: block.feed_forward.sub_norm.register_forward_pre_hook(lambda *_: None), False),
        (lambda block: block.double(), False),
    ],
)
def test_modules_that_do_more_are_called(
    change: Callable[[Block], object], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels for every device; what they give is what modules give."""
    config = LongNetConfig(vocab_size=1, dim=256, heads=4, layers=1, segment_lengths=64, dilation_rates=1)
    torch.manual_seed(0)
    block = Block(config)
    change(block)
    block.to(DEVICE)
    module, calls = block.feed_forward, []
    own = type(module.fc2).forward

    def forward(called: nn.Module, x: Tensor) -> Tensor:
        calls.extend([1] * (called is module.fc2))
        return own(called, x)

    # Of the class: a module with a forward of its own is called too.
    monkeypatch.setattr(type(module.fc2), "forward", forward)
    x = draw(1, 9, 256).to(next(module.parameters()))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=x.dtype == torch.float32):
        expected = module(x)
        assert len(calls) == (0 if joined and DEVICE == "cuda" else 1)
        calls.clear()
        monkeypatch.setattr(normed, "fits", lambda device, dtype, channels: dtype == torch.bfloat16)
        found = module(x)
    assert len(calls) == (0 if joined else 1)
    assert (found.double() - expected.double()).norm() <= 1e-2 * expected.double().norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_feed_forward_takes_it(kind, compiled):
    torch.manual_seed(0)
    config = LongNetConfig(vocab_size=1, dim=256, heads=4, layers=1, segment_lengths=64, dilation_rates=1, norm=kind)
    module = FeedForward(config, device=DEVICE)
    x = draw(2, 50, 256).float().to(DEVICE).requires_grad_()
    call = torch.compile(module) if compiled else module
    with torch.autocast("cuda", torch.float16):
        out = call(x)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])
    exact = module.double()
    wide = x.detach().double().requires_grad_()
    expected = exact(wide)
    wanted = torch.autograd.grad(expected.square().sum(), [wide, *exact.parameters()])
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() <= 5e-3 * want.norm()
