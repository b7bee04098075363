"""torch.func, forward-mode AD and torch.jit.trace: exact, or refused by name."""

from __future__ import annotations

import pytest
import torch
from oracle import dense_attention
from patterns import relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacrev, jvp, vjp, vmap

from longnet import (
    DilatedAttention,
    DilatedCache,
    LongNetConfig,
    LongNetEncoder,
    LongNetLM,
    dilated_attention,
    stream_attention,
)

# torch deprecates its own trace.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
BACKENDS = ("cpu_flash", "portable")
PATTERN = (4, 12), (1, 2)
TRACED = "cannot be recorded by torch.jit.trace.*torch.export"
FORWARD = "has no forward-mode derivative.*torch.func.vjp"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(*batch: int) -> tuple[Tensor, ...]:
    return tuple(draw(*batch, 1, 2, 12, 4, seed=seed) for seed in range(3))


def ours(backend: str):
    def attend(q, k, v):
        out, lse = dilated_attention(q, k, v, *PATTERN, is_causal=True, return_lse=True, backend=backend)
        return (out * lse[..., None]).sin()

    return attend


def definition(q, k, v):
    out, lse = dense_attention(q, k, v, *PATTERN, is_causal=True)
    return (out * lse[..., None]).sin()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode(backend):
    tensors, weights = inputs(), draw(1, 2, 12, 4, seed=9)
    (out, pull), (expected, expected_pull) = vjp(ours(backend), *tensors), vjp(definition, *tensors)
    assert relative_error(out, expected) < 1e-10
    for got, want in zip(pull(weights), expected_pull(weights), strict=True):
        assert relative_error(got, want) < 1e-10
    got, want = (
        jacrev(lambda q, attend=attend: attend(q, *tensors[1:]).sum(-1))(tensors[0])
        for attend in (ours(backend), definition)
    )
    assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_gradients_of_each_sample(backend):
    tensors = inputs(3)
    got, want = (
        vmap(attend, in_dims=(0, 0, None))(*tensors[:2], tensors[2][0]) for attend in (ours(backend), definition)
    )
    assert relative_error(got, want) < 1e-10
    for which in range(3):
        got, want = (
            vmap(grad(lambda *x, attend=attend: attend(*x).sum(), argnums=which))(*tensors)
            for attend in (ours(backend), definition)
        )
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("options", [dict(use_xpos=True), dict(use_rel_pos_bias=True)])
def test_gradients_of_each_sample_of_a_module(options):
    module = DilatedAttention(8, 2, *reversed(PATTERN), causal=True, dtype=torch.float64, **options)
    weights, x = dict(module.named_parameters()), draw(3, 12, 8)

    def loss(weights, x):
        return functional_call(module, weights, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for sample in range(3):
        alone = torch.autograd.grad(module(x[sample, None]).square().sum(), list(weights.values()))
        for (name, _), expected in zip(weights.items(), alone, strict=True):
            torch.testing.assert_close(each[name][sample], expected)


def test_gradients_of_models():
    options = dict(vocab_size=11, dim=16, heads=2, layers=2, segment_lengths=PATTERN[0], dilation_rates=PATTERN[1])
    tokens = torch.arange(12)[None] % 11
    for model in (LongNetLM(LongNetConfig(**options)), LongNetEncoder(LongNetConfig(**options, causal=False))):
        weights = dict(model.named_parameters())
        got = grad(lambda weights, model=model: functional_call(model, weights, (tokens,)).square().sum())(weights)
        expected = torch.autograd.grad(model(tokens).square().sum(), list(weights.values()), materialize_grads=True)
        for one, other in zip(got.values(), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_functionalize():
    assert torch.equal(functionalize(ours("cpu_flash"))(*inputs()), ours("cpu_flash")(*inputs()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend):
    """The operators would drop a tangent, which is a derivative of 0, without a word."""
    tensors, attend = inputs(), ours(backend)
    with pytest.raises(RuntimeError, match=FORWARD):
        jvp(attend, tensors, tensors)
    with pytest.raises(RuntimeError, match=FORWARD):
        hessian(lambda q: attend(q, *tensors[1:]).sum())(tensors[0])
    with pytest.raises(RuntimeError, match=FORWARD), forward_ad.dual_level():
        attend(tensors[0], tensors[1], forward_ad.make_dual(tensors[2], tensors[2]))
    with pytest.raises(RuntimeError, match=FORWARD):
        jvp(lambda *x: vmap(attend)(*x), inputs(2), inputs(2))
    with forward_ad.dual_level():
        # Nothing here has a tangent.
        assert torch.equal(attend(*tensors), attend(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    tensors, attend = inputs(), ours(backend)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad(lambda q: grad(lambda q: attend(q, *tensors[1:]).sum())(q).sum())(tensors[0])


def test_a_trace_is_refused():
    module = DilatedAttention(8, 2, *reversed(PATTERN), causal=True, use_xpos=True)
    config = LongNetConfig(vocab_size=11, dim=16, heads=2, layers=1, segment_lengths=(4,), dilation_rates=(1,))
    with pytest.raises(RuntimeError, match=TRACED):
        torch.jit.trace(ours("cpu_flash"), inputs())
    with pytest.raises(RuntimeError, match=TRACED):
        torch.jit.trace(module, (torch.randn(1, 12, 8),))
    with pytest.raises(RuntimeError, match=TRACED):
        torch.jit.trace(LongNetLM(config), (torch.zeros(1, 5, dtype=torch.int64),))


def test_a_stream_is_transformed_by_nothing():
    cache = DilatedCache(*PATTERN, batch_size=1, heads=2, head_dim=4, dtype=torch.float64)

    def read(q, k, v):
        return stream_attention(q, k, v, cache)

    with pytest.raises(RuntimeError, match=TRACED):
        torch.jit.trace(read, inputs())
    said = "stream_attention writes to its cache"
    for transformed in (vmap(read), jacrev(read)):
        with pytest.raises(RuntimeError, match=said):
            transformed(*inputs(2))
    with pytest.raises(RuntimeError, match=said):
        jvp(read, inputs(), inputs())
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match=said), forward_ad.dual_level():
        read(forward_ad.make_dual(q, q), k, v)
    assert cache.position == 0
    assert relative_error(read(q, k, v), dense_attention(q, k, v, *PATTERN, is_causal=True)[0]) < 1e-10
