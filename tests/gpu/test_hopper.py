"""The kernels for Hopper GPUs compute what the definition says, and say when they do not fit."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from calls import call

from longnet.attention.backends import portable
from longnet.attention.backends.triton import backend as triton_flash
from longnet.attention.backends.triton import hopper
from longnet.attention.call import SavedForward
from longnet.attention.functional import pattern_attention
from longnet.compat.attention import TORCHSCALE
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]

PAPER = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
PATTERNS = {
    "paper": PAPER,
    # Two nests, the second mixed into the first.
    "mixed": Pattern.parse((1024, 3000), (1, 4)),
    # Rows that nobody covers, at rates that skip one.
    "uncovered": Pattern.parse((1024, 4096), (2, 8)),
    "blocked": Pattern.parse((1024, 4096), (1, 4), "blocked"),
    "one rate twice": Pattern.parse((512, 1024, 2048), (1, 2, 2)),
    "one branch": Pattern.parse(600, 3),
}


def draw(heads, kv_heads, length, dim, dtype, tokens_first, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    found = []
    for count in (heads, kv_heads, kv_heads, heads):
        shape = (2, length, count, dim) if tokens_first else (2, count, length, dim)
        x = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        found.append(x.transpose(1, 2) if tokens_first else x)
    return found


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def allowed(query, key, value, grad, is_causal):
    """Twice the errors of torch's own attention in this type: (out, gradients)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    results = []
    for convert in (lambda x: x.detach().clone(), lambda x: x.detach().double()):
        inputs = [convert(x[:1, :1, :1024]).requires_grad_() for x in (query, key, value)]
        out = attend(*inputs, is_causal=is_causal)
        results.append((out, *torch.autograd.grad(out, inputs, convert(grad[:1, :1, :1024]))))
    errors = [2 * relative(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    return errors[0], max(errors[1:])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [48, 64, 96, 128])
@pytest.mark.parametrize(
    ("name", "length", "heads", "kv_heads", "dtype", "tokens_first"),
    [
        ("paper", 9008, 16, 16, torch.bfloat16, False),
        ("paper", 5008, 16, 4, torch.bfloat16, True),
        ("mixed", 5000, 8, 8, torch.float16, False),
        ("uncovered", 6000, 8, 8, torch.bfloat16, True),
        ("blocked", 6000, 8, 2, torch.bfloat16, False),
        ("one rate twice", 3002, 4, 4, torch.float16, True),
        ("one branch", 2001, 4, 4, torch.bfloat16, False),
        # Lengths that the rates do not divide are filled up.
        ("paper", 9001, 16, 4, torch.bfloat16, True),
        ("mixed", 5003, 8, 8, torch.float16, False),
        ("blocked", 6002, 8, 2, torch.float16, True),
        ("one branch", 2000, 4, 4, torch.bfloat16, False),
    ],
)
def test_equals_the_definition(name, length, heads, kv_heads, dtype, tokens_first, dim, is_causal):
    pattern = PATTERNS[name]
    query, key, value, grad = draw(heads, kv_heads, length, dim, dtype, tokens_first)
    assert hopper.unsupported_reason(query, None) is None
    assert set(nests_that_fit(pattern, query)) == {True}
    check(pattern, is_causal, query, key, value, grad)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "rates", "fit"),
    [
        ((1024, 8192, 8192), (1, 128, 256), [True, True, False]),
        # What is launched first leaves rows to the rest.
        ((32, 2048), (1, 2), [False, True]),
    ],
)
def test_nests_that_do_not_fit_are_left_to_the_portable_kernels(lengths, rates, fit, is_causal):
    pattern = Pattern.parse(lengths, rates)
    query, key, value, grad = draw(4, 2, 8192, 64, torch.bfloat16, True)
    assert nests_that_fit(pattern, query) == fit
    check(pattern, is_causal, query, key, value, grad)


def padding_of(kind, length):
    """(2, length), True where a token is padding."""
    mask = torch.zeros(2, length, dtype=torch.bool, device="cuda")
    if kind == "left":
        mask[0, :300] = mask[1, : length // 2 + 1] = True
    elif kind == "right":
        mask[0, -700:] = mask[1, -length // 3 :] = True
    elif kind == "scattered":
        mask = torch.rand(mask.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda") < 0.3
        # Whole tiles too, and the first rows of a causal sequence have no key at all.
        mask[0, 1200:2100] = mask[1, :200] = True
    elif kind == "a row":
        mask[1] = True
    else:
        mask[0, 1000] = mask[1, -1] = True
    return mask


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize("kind", ["left", "right", "scattered", "a row", "a token"])
def test_padding_is_masked(kind, dim, is_causal):
    tensors = draw(16, 4, 9001, dim, torch.bfloat16, True)
    check(PAPER, is_causal, *tensors, mask=padding_of(kind, 9001))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", ["right", "scattered"])
@pytest.mark.parametrize(
    ("name", "length", "heads", "kv_heads", "dtype", "dim"),
    [
        ("mixed", 5003, 8, 8, torch.float16, 64),
        ("uncovered", 6000, 8, 8, torch.bfloat16, 128),
        ("blocked", 6002, 8, 2, torch.float16, 64),
        ("one rate twice", 3002, 4, 4, torch.float16, 96),
        ("one branch", 2000, 4, 4, torch.bfloat16, 64),
    ],
)
def test_padding_is_masked_in_every_pattern(name, length, heads, kv_heads, dtype, dim, kind, is_causal):
    tensors = draw(heads, kv_heads, length, dim, dtype, False)
    check(PATTERNS[name], is_causal, *tensors, mask=padding_of(kind, length))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("offsets", [None, (-37, 5000)])
def test_padding_is_masked_on_grids_of_rows_and_strided_masks(offsets, is_causal):
    tensors = draw(8, 2, 5000, 64, torch.bfloat16, True)
    mask = padding_of("left", 5000).repeat_interleave(3, 1).T.contiguous().T[:, ::3]
    offsets = None if offsets is None else torch.tensor(offsets, device="cuda")
    check(Pattern.parse((1024, 4096), (1, 4)), is_causal, *tensors, mask=mask, offsets=offsets)


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_is_masked_by_kernels_of_both_kinds_in_one_call(is_causal):
    pattern = Pattern.parse((1024, 8192, 8192), (1, 128, 256))
    tensors = draw(4, 2, 8192, 64, torch.bfloat16, True)
    check(pattern, is_causal, *tensors, mask=padding_of("scattered", 8192))


def nests_that_fit(pattern, query):
    nests = make_nests(pattern, query.shape[1], hopper.UNIT, triton_flash.LEAST_ROWS)
    ours, _ = hopper.split_nests(nests, query.shape[2])
    return [nest in ours for nest in nests]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [48, 128])
def test_one_tensor_may_be_query_key_and_value(dim, is_causal):
    query, _, _, grad = draw(8, 8, 5008, dim, torch.bfloat16, True)
    check(PAPER, is_causal, query, query, query, grad)


@pytest.mark.parametrize("dim", [48, 64])
def test_what_lies_behind_the_tensors_does_not_matter(dim):
    """Room after tokens and channels, and before them, is NaN."""
    drawn = draw(4, 4, 3001, dim, torch.bfloat16, False)
    rooms = [x.new_full((2, 4, 3100, dim + 16), float("nan")) for x in drawn]
    views = [room[:, :, 8:3009, 8 : dim + 8].copy_(x) for room, x in zip(rooms, drawn, strict=True)]
    check(PATTERNS["mixed"], False, *views)


# Shapes and patterns of tests above, whose kernels are compiled already.
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize(
    ("name", "length", "heads", "kv_heads", "dtype", "tokens_first"),
    [
        ("paper", 9008, 16, 16, torch.bfloat16, False),
        ("mixed", 5003, 8, 8, torch.float16, False),
        ("uncovered", 6000, 8, 8, torch.bfloat16, True),
        ("blocked", 6000, 8, 2, torch.bfloat16, False),
    ],
)
def test_queries_of_dead_rows_never_matter(name, length, heads, kv_heads, dtype, tokens_first, dim, is_causal):
    check_dead_rows(PATTERNS[name], is_causal, *draw(heads, kv_heads, length, dim, dtype, tokens_first))


@pytest.mark.parametrize("is_causal", [True, False])
def test_queries_of_dead_rows_never_matter_to_kernels_of_both_kinds_in_one_call(is_causal):
    pattern = Pattern.parse((1024, 8192, 8192), (1, 128, 256))
    check_dead_rows(pattern, is_causal, *draw(4, 2, 8192, 64, torch.bfloat16, True))


def check_dead_rows(pattern, is_causal, query, key, value, grad):
    """Rows without gradients, whose queries are NaN or infinite: the same bits as with others, and right ones."""
    generator = torch.Generator("cuda").manual_seed(1)
    dead = torch.rand(query.shape[:-1], generator=generator, device="cuda") < 0.2
    dead[0, :, -query.shape[2] // 5 :] = True
    grad = grad.masked_fill(dead[..., None], 0.0)
    fills = torch.tensor([torch.nan, torch.inf, -torch.inf], device="cuda", dtype=query.dtype)
    fill = fills[torch.randint(3, (*dead.shape, 1), generator=generator, device="cuda")]
    # As dense as the query, or one tensor for queries, keys and values as a projection gives them.
    poisoned = torch.where(dead[..., None], fill, query)
    wide = torch.cat((poisoned, query), -1)[..., : query.shape[-1]]
    exact_call = call(query.double(), key.double(), value.double(), pattern, is_causal)
    want, want_lse = portable.forward(exact_call)
    upstream = torch.randn(query.shape[:-1], generator=generator, device="cuda")
    grad_lse = upstream.masked_fill(dead | want_lse.isinf(), 0.0)
    for given_lse in (None, grad_lse):
        results = []
        for q in (query, poisoned, wide):
            inputs = call(q, key, value, pattern, is_causal)
            saved = SavedForward(inputs, *triton_flash.forward(inputs))
            before = q.clone()
            results.append(triton_flash.backward(saved, grad, given_lse)[:3])
            torch.testing.assert_close(q, before, rtol=0, atol=0, equal_nan=True)
        for finite, *others in zip(*results, strict=True):
            assert finite.isfinite().all()
            assert all(torch.equal(other, finite) for other in others)
        assert not results[1][0][dead].any()
        exact = None if given_lse is None else given_lse.double()
        want_grads = portable.backward(SavedForward(exact_call, want, want_lse), grad.double(), exact)[:3]
        _, for_grads = allowed(query, key, value, grad, is_causal)
        for got, expected in zip(results[1], want_grads, strict=True):
            assert relative(got, expected) <= for_grads


def check(pattern, is_causal, query, key, value, grad, *, mask=None, offsets=None):
    """Out, lse and gradients against the definition; keys and values that are padding hold NaN, as does memory given back."""
    keys_values = [key, value]
    if mask is not None:
        keys_values = [x.masked_fill(mask[:, None, :, None], torch.nan) for x in keys_values]
        poison = [torch.full_like(query, torch.nan) for _ in range(8)]
        del poison
    inputs = replace(call(query, *keys_values, pattern, is_causal, mask=mask), offsets=offsets)
    out, lse = triton_flash.forward(inputs)
    grad_lse = torch.randn_like(lse).masked_fill(lse.isinf(), 0.0)
    saved = SavedForward(inputs, out, lse)
    grads = triton_flash.backward(saved, grad, grad_lse)[:3]

    exact = call(query.double(), key.double(), value.double(), pattern, is_causal, mask=mask)
    exact = replace(exact, offsets=offsets)
    want, want_lse = portable.forward(exact)
    want_grads = portable.backward(SavedForward(exact, want, want_lse), grad.double(), grad_lse.double())[:3]
    for_out, for_grads = allowed(query, key, value, grad, is_causal)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert relative(out, want) <= for_out
    for got, expected in zip(grads, want_grads, strict=True):
        assert relative(got, expected) <= for_grads
    if mask is not None:
        assert not any(x.transpose(1, 2)[mask].any() for x in grads[1:])
    again, lse_again = triton_flash.forward(inputs)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    for first, second in zip(grads, triton_flash.backward(saved, grad, grad_lse), strict=False):
        assert torch.equal(first, second)


def test_both_kinds_of_kernels_agree():
    query, key, value, grad = draw(16, 16, 4096, 64, torch.bfloat16, False)
    inputs = call(query, key, value, PAPER, True)
    results = []
    for kernels in (triton_flash, triton_flash.General):
        out, lse = kernels.forward(inputs)
        results.append((out, *kernels.backward(SavedForward(inputs, out, lse), grad, None)[:3]))
    for one, other in zip(*results, strict=True):
        assert relative(one, other.double()) < 4e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 4099, "pattern": ((4000, 4001), (25, 27))}, "no multiple of the rate"),
        ({"dim": 32}, "head dimensions"),
        ({"dtype": torch.float32}, "not torch.float32"),
    ],
)
def test_what_does_not_fit_is_logged_and_computed_all_the_same(change, reason, caplog):
    change = {"length": 4096, "dim": 64, "dtype": torch.bfloat16, "pattern": ((1024, 2048), (1, 2)), **change}
    query, key, value, _ = draw(4, 4, change["length"], change["dim"], change["dtype"], False)
    pattern = Pattern.parse(*change["pattern"])
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        out, _ = triton_flash.forward(call(query, key, value, pattern, True, 0.125))
    assert reason in caplog.text
    want, _ = portable.forward(call(query.double(), key.double(), value.double(), pattern, True, 0.125))
    assert relative(out, want) < 4e-3


@pytest.mark.parametrize("length", [3000, 10_001, 45_681])
@pytest.mark.parametrize("dim", [48, 128])
def test_rows_that_nobody_reads_are_left_out(length, dim):
    pattern = Pattern.parse((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16), "blocked")
    query, key, value, grad = draw(16, 16, length, dim, torch.float16, False)
    read = torch.zeros(length, dtype=torch.bool, device="cuda")
    for branch in pattern.branches:
        read[: branch.segment_length : branch.dilation_rate] = True
    inputs = [x.requires_grad_() for x in (query, key, value)]
    results = []
    for some in (False, True):
        # What was given back holds numbers that spread.
        poison = [torch.full_like(query, torch.nan) for _ in range(8)] + [
            torch.full((1 << 24,), torch.nan, device="cuda")
        ]
        del poison
        out, lse = pattern_attention(*inputs, pattern, return_lse=True, needed_by_first=some, definition=TORCHSCALE)
        grads = torch.autograd.grad(out, inputs, grad * read[:, None])
        results.append((out[:, :, read], lse[:, :, read], *grads))
        if some:
            assert not out[:, :, ~read].any()
    for want, got in zip(*results, strict=True):
        assert relative(got, want.double()) < 1e-3
