"""Pruned heads and quantised weights on a CUDA device. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from patterns import KeptHeads, Problem, backward, kept_heads, relative_error

from longnet import LongNetConfig, LongNetLM
from longnet.attention.functional import pattern_attention
from longnet.compress import SCHEMES, prune_heads, quantize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]


@given(kept=kept_heads())
@settings(max_examples=40, deadline=None)
def test_the_kernels_give_kept_heads_what_they_have_among_all(kept: KeptHeads) -> None:
    one = Problem(**{**vars(kept.problem), "dtype": torch.float32})
    kept = KeptHeads(one, kept.kv_heads)
    inputs = tuple(x.detach().cuda().requires_grad_() for x in kept.tensors())
    mask = one.mask()
    out, lse = pattern_attention(
        *inputs, kept.pattern, is_causal=one.is_causal, key_padding_mask=None if mask is None else mask.cuda(),
        return_lse=True, backend="triton",
    )  # fmt: skip
    expected, _, grads = kept.expected()
    assert relative_error(out.cpu(), expected) < 1e-5
    upstream = tuple(x.cuda() for x in kept.upstream())
    for got, want in zip(backward(out, lse, inputs, upstream), grads, strict=True):
        assert relative_error(got.cpu(), want) < 1e-4


def pruned() -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano", dim=64)).eval()
    return prune_heads(model, {0: [0, 2], 1: [3]}).cuda()


def test_a_pruned_model_streams_and_generates() -> None:
    model, batch = pruned(), torch.randint(256, (2, 130), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        expected, cache = model(batch), model.new_cache(2)
        ends = [7, *range(8, 70), 130]
        parts = [model(batch[:, first:last], cache=cache) for first, last in zip([0, *ends], ends, strict=False)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.cpu(), model.cpu()(batch.cpu()), rtol=1e-3, atol=1e-3)
    assert model.cuda().generate(batch[:, :50], 8, temperature=0).shape == (2, 58)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_model_stays_close(scheme: str) -> None:
    pytest.importorskip("torchao")
    model, batch = pruned().bfloat16(), torch.randint(256, (2, 96), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        expected = model(batch).float()
        quantize(model, scheme)
        assert (model(batch).float() - expected).norm() < 0.1 * expected.norm()
    assert model.generate(batch[:, :50], 4, temperature=0).shape == (2, 54)
