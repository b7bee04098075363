"""The operator pairs as torch sees them: opcheck, compile, export, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch.utils.checkpoint import checkpoint

import longnet
from longnet import dilated_attention
from longnet.attention.call import AttentionSpec
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

BACKENDS = ("cpu_flash", "portable")
PATTERN = ((8, 16), (1, 3))


def tensors(length=24, dtype=torch.float32, kv_heads=4):
    torch.manual_seed(0)
    q = torch.randn(2, length, 4, 8, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, length, kv_heads, 8, dtype=dtype).transpose(1, 2) for _ in range(2))
    return tuple(x.requires_grad_() for x in (q, k, v))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_opcheck(name, padded, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    mask = torch.rand(2, 24) < 0.3 if padded else None
    bias = torch.randn(4, 2 * 24 - 1, requires_grad=True) if name == "portable" else None
    settings = AttentionSpec(Pattern.parse(*PATTERN), True, 0.3).encode()
    forward = getattr(torch.ops.longnet, name).default
    torch.library.opcheck(forward, (q, k, v, mask, None, bias, *settings))
    out, lse = (x.detach() for x in forward(q, k, v, mask, None, bias, *settings))
    plain = [x.detach() for x in (q, k, v)] + [mask, None, None if bias is None else bias.detach()]
    backward = getattr(torch.ops.longnet, f"{name}_backward").default
    for grad_lse in (None, torch.randn_like(lse)):
        args = (torch.randn_like(out), grad_lse, *plain, out, lse, *settings)
        torch.library.opcheck(
            backward, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_to_one_graph_with_gradients(name):
    def loss(q, k, v):
        return dilated_attention(q * 2, k, v, *PATTERN, is_causal=True, backend=name).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (24, 31, 17):
        inputs = tensors(length)
        expected = torch.autograd.grad(loss(*inputs), inputs)
        for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_compiles_with_the_default_backend_of_torch_compile():
    q, k, v = tensors()
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q.sin(), k, v, *PATTERN, return_lse=True), fullgraph=True
    )
    # What the compiler makes of loops is torch's affair, and takes g++ long with vectors.
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        found = compiled(q, k, v)
    for got, want in zip(found, dilated_attention(q.sin(), k, v, *PATTERN, return_lse=True), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_xpos", [False, True])
@pytest.mark.parametrize("use_rel_pos_bias", [False, True])
def test_exports_with_a_dynamic_length(use_xpos, use_rel_pos_bias):
    module = longnet.DilatedAttention(16, 4, (1, 2), (8, 16), 0.1, True, use_xpos, use_rel_pos_bias).eval()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(2, 24, 16),), dynamic_shapes=({1: length},))
    for n in (5, 24, 57):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_as_torchs_attention_does(name):
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dilated_attention(q, k, v, *PATTERN, backend=name)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        # Projections under autocast and norms outside it give mixed inputs.
        mixed = dilated_attention(q, k.bfloat16(), v.bfloat16(), *PATTERN, backend=name)
    expected = dilated_attention(*(x.bfloat16() for x in (q, k, v)), *PATTERN, backend=name)
    assert torch.equal(out, expected) and torch.equal(mixed, expected)
    assert [grad.dtype for grad in torch.autograd.grad(out.float().sum(), (q, k, v))] == [torch.float32] * 3
    double = [x.double() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dilated_attention(*double, *PATTERN, backend=name).dtype == torch.float64


@pytest.mark.parametrize("name", BACKENDS)
def test_checkpointing_gives_the_same_gradients(name):
    inputs = tensors(dtype=torch.float64)

    def attend(q, k, v):
        return dilated_attention(q, k, v, *PATTERN, is_causal=True, backend=name)

    plain = torch.autograd.grad(attend(*inputs).sum(), inputs)
    saved = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_derivative_is_refused_clearly(name):
    inputs = tensors(dtype=torch.float64)
    out = dilated_attention(*inputs, *PATTERN, backend=name)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first[0].sum(), inputs)


def test_gradients_by_finite_differences():
    """Independent of the oracle: gradcheck of out and lse, with grouped heads, padding and a bias."""
    torch.manual_seed(1)
    q = torch.randn(1, 2, 7, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 6 + [True]])

    def attend(q, k, v, bias):
        pattern = Pattern.parse((4, 7), (1, 2))
        return pattern_attention(q, k, v, pattern, key_padding_mask=mask, distance_bias=bias, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, None), (q, k, v))


def test_meta_tensors_know_their_shape():
    q = torch.empty(2, 4, 24, 8, device="meta")
    out, lse = dilated_attention(q, q, q, *PATTERN, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1] and out.device.type == "meta"
