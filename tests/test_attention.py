"""The module against a dense, float64 rewriting of what it should do."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from oracle import dense_attention
from patterns import relative_error
from torch import Tensor
from torch.nn.utils import prune

from longnet import DilatedAttention


def naive_xpos(x: Tensor, scale_base: float, sign: int) -> Tensor:
    """xPos by its formula, one position and channel pair at a time, relative to position 0."""
    out = torch.empty_like(x)
    length, dim = x.shape[-2:]
    for p in range(length):
        for i in range(0, dim, 2):
            angle = p / 10_000 ** (i / dim)
            scale = ((i / dim + 0.4) / 1.4) ** (sign * p / scale_base)
            a, b = x[..., p, i], x[..., p, i + 1]
            out[..., p, i] = (a * math.cos(angle) - b * math.sin(angle)) * scale
            out[..., p, i + 1] = (b * math.cos(angle) + a * math.sin(angle)) * scale
    return out


def naive_bucket(distance: int, is_causal: bool, buckets: int, max_distance: int) -> int:
    offset = 0
    if is_causal:
        distance = max(0, -distance)
    else:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))
    return offset + min(far, buckets - 1)


def naive(module: DilatedAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    batch, length, dim = x.shape

    def heads(projection, count):
        return projection(x).view(batch, length, count, module.head_dim).transpose(1, 2)

    q, k, v = (
        heads(module.q_proj, module.heads),
        heads(module.k_proj, module.kv_heads),
        heads(module.v_proj, module.kv_heads),
    )
    if module.q_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + module.q_norm.eps).sqrt() * module.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + module.k_norm.eps).sqrt() * module.k_norm.weight
    if module.xpos is not None:
        q, k = naive_xpos(q, module.xpos.scale_base, 1), naive_xpos(k, module.xpos.scale_base, -1)
    bias = None
    if module.rel_pos_bias is not None:
        table = module.rel_pos_bias.weight
        rows = [[naive_bucket(b - a, module.causal, 32, 128) for b in range(length)] for a in range(length)]
        bias = table[torch.tensor(rows)].permute(2, 0, 1)
    pattern = module.pattern
    out, _ = dense_attention(
        q, k, v, pattern.segment_lengths, pattern.dilation_rates,
        is_causal=module.causal, key_padding_mask=mask, head_offsets=pattern.head_offsets, score_bias=bias,
    )  # fmt: skip
    return module.out_proj(out.transpose(1, 2).reshape(batch, length, dim))


FLAGS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(("causal", "use_xpos", "use_rel_pos_bias", "qk_norm"), FLAGS)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_every_combination_equals_the_naive_module(causal, use_xpos, use_rel_pos_bias, qk_norm, kv_heads):
    torch.manual_seed(0)
    module = DilatedAttention(
        16, 4, (1, 2), (12, 40), 0.0, causal, use_xpos, use_rel_pos_bias, qk_norm=qk_norm, kv_heads=kv_heads, dtype=torch.float64
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 53, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 53) < 0.2
    for padding in (None, mask):
        out, expected = module(x, padding), naive(module, x, padding)
        assert relative_error(out, expected) < 1e-10
        inputs = (x, *module.parameters())
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, upstream)
        for grad, want in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
            assert relative_error(grad, want) < 1e-9


def test_dropout_acts_on_the_attention_output_in_training_only():
    torch.manual_seed(0)
    module = DilatedAttention(16, 4, 1, 8, dropout=0.5)
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(4, 64, 16)
    module.eval()
    kept = module(x)
    assert torch.equal(kept, module(x))
    module.train()
    dropped = module(x)
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


def test_dropout_changes_nothing_when_off():
    torch.manual_seed(0)
    with_dropout, without = DilatedAttention(16, 4, 1, 8, dropout=0.3), DilatedAttention(16, 4, 1, 8)
    with_dropout.load_state_dict(without.state_dict())
    x = torch.randn(2, 20, 16)
    assert torch.equal(with_dropout.eval()(x), without(x))


def test_xpos_never_touches_the_layers_input():
    """Values carry no position: with one key per query, xPos must change nothing."""
    torch.manual_seed(0)
    plain, rotated = DilatedAttention(16, 4, 1, 1), DilatedAttention(16, 4, 1, 1, use_xpos=True)
    rotated.load_state_dict(plain.state_dict())
    x = torch.randn(2, 30, 16)
    assert torch.equal(plain(x), rotated(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_dict_loads_across_dtypes(dtype):
    module = DilatedAttention(16, 4, (1, 2), (8, 16), use_rel_pos_bias=True, qk_norm=True)
    other = DilatedAttention(16, 4, (1, 2), (8, 16), use_rel_pos_bias=True, qk_norm=True, dtype=dtype)
    other.load_state_dict(module.state_dict())
    assert all(parameter.dtype == dtype for parameter in other.parameters())
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(other(x.to(dtype)).float(), module(x), rtol=0.1, atol=0.1)
    moved = DilatedAttention(16, 4, (1, 2), (8, 16), use_rel_pos_bias=True, qk_norm=True, device="meta")
    moved.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(moved(x), module(x))


def test_the_parameters_are_the_four_projections():
    names = {name for name, _ in DilatedAttention(16, 4, 2, 8).named_parameters()}
    assert names == {f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert not any("bias" in name for name, _ in DilatedAttention(16, 4, 2, 8, bias=False).named_parameters())


def test_pruning_its_projections():
    module = DilatedAttention(16, 4, 1, 8)
    before = module(torch.ones(1, 8, 16))
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        prune.l1_unstructured(projection, "weight", amount=0.5)
    assert (module.v_proj.weight == 0).float().mean() == 0.5
    out = module(torch.ones(1, 8, 16))
    assert not torch.equal(out, before)
    out.sum().backward()
    assert not module.v_proj.weight_orig.grad[module.v_proj.weight_mask == 0].any()
    prune.remove(module.v_proj, "weight")
    assert torch.equal(module(torch.ones(1, 8, 16)), out)


def test_copies_and_dtype_moves():
    module = DilatedAttention(16, 4, (1, 2), (8, 16), use_xpos=True, use_rel_pos_bias=True)
    x = torch.randn(1, 20, 16)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("options", [{}, {"use_xpos": True}, {"use_rel_pos_bias": True}, {"qk_norm": True}])
def test_autocast_and_empty_input(options):
    module = DilatedAttention(16, 4, (1, 2), (8, 16), causal=True, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.randn(2, 20, 16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    out.float().sum().backward()
    assert module.q_proj.weight.grad.dtype == torch.float32
    assert module(torch.randn(2, 0, 16)).shape == (2, 0, 16)
    assert module(torch.randn(0, 5, 16)).shape == (0, 5, 16)


@pytest.mark.parametrize("kind", ["layer", "rms", "batch"])
def test_sub_norm_stands_before_the_output_projection(kind):
    torch.manual_seed(0)
    module = DilatedAttention(16, 4, 1, 8, sub_norm=kind, dtype=torch.float64)
    plain = DilatedAttention(16, 4, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("sub_norm")})
        plain.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    expected = module.out_proj(module.sub_norm(plain(x)))
    torch.testing.assert_close(module(x), expected)


def test_the_whole_layer_is_causal():
    module = DilatedAttention(16, 4, (1, 2), (8, 16), causal=True, use_xpos=True, use_rel_pos_bias=True, qk_norm=True)
    x = torch.randn(1, 30, 16)
    changed = x.clone()
    changed[:, 17:] = 5.0
    assert torch.equal(module(x)[:, :17], module(changed)[:, :17])
    assert not torch.equal(module(x)[:, 17:], module(changed)[:, 17:])
