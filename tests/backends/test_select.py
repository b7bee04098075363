"""One predicate, two moods: automatic choice logs why a backend was passed over, a name raises it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from calls import call_on

from longnet import dilated_attention
from longnet.attention.backends import BACKENDS, NAMES, VARIANTS, select_backend
from longnet.attention.backends.triton import backend as triton_flash
from longnet.geometry import Pattern


def test_a_plain_cpu_call_takes_the_flash_kernel():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert select_backend("auto", call_on("cpu", dtype)).name == "cpu_flash"


def test_passing_over_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="longnet"):
        assert select_backend("auto", call_on("cuda", torch.float64)).name == "portable"
        assert select_backend("auto", call_on("cpu", torch.float32, True)).name == "portable"
    assert "cpu_flash passed over: it runs on cpu tensors, not cuda" in caplog.text
    assert "triton passed over: it takes torch.float32, torch.bfloat16, torch.float16, not torch.float64" in caplog.text
    assert "no gradient for a score bias" in caplog.text


def test_a_name_that_cannot_run_raises_its_reason():
    with pytest.raises(ValueError, match=r"backend='cpu_flash' cannot run.*not cuda"):
        select_backend("cpu_flash", call_on("cuda", torch.float32))
    with pytest.raises(ValueError, match=r"backend='cpu_flash' cannot run.*score bias"):
        select_backend("cpu_flash", call_on("cpu", torch.float32, True))


def test_an_unknown_name_lists_the_known_ones():
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="backend='flash3' is unknown.*cpu_flash.*portable"):
        dilated_attention(q, q, q, 2, 1, backend="flash3")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1e5, -1e10, 1e30])
def test_huge_scales_have_right_gradients(scale, is_causal):
    """Each query then reads its best key alone: its value has the whole gradient, and scores have none."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=draw).requires_grad_() for _ in range(3))
    out = dilated_attention(q, k, v, 32, 1, is_causal=is_causal, scale=scale)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    hidden = torch.ones(20, 20).triu(1).bool() & is_causal
    best = (q @ k.transpose(-1, -2) * (1 if scale > 0 else -1)).masked_fill(hidden, -torch.inf).argmax(-1)
    counts = torch.nn.functional.one_hot(best, 20).sum(-2).float()
    torch.testing.assert_close(grads[2], counts[..., None].expand_as(v))
    assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(ValueError, match="cpu_flash: its gradients lose their digits for scales above 100"):
        dilated_attention(q, k, v, 32, 1, scale=scale, backend="cpu_flash")


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES) == 1 + len(BACKENDS) + len(VARIANTS)


def test_a_variant_is_taken_by_name_alone():
    inputs = call_on("cuda", torch.bfloat16)
    assert select_backend("triton:general", inputs).name == "triton:general"
    assert select_backend("auto", inputs).name == "triton"
    with pytest.raises(ValueError, match="backend='triton:general' cannot run these inputs: triton:general: it takes"):
        select_backend("triton:general", call_on("cuda", torch.float64))


def test_kernels_for_hopper_alone_say_what_they_do_not_take(monkeypatch):
    on_gpu = call_on("cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="triton:hopper: (it runs on cuda|they need a GPU of compute capability 9)"):
        select_backend("triton:hopper", call_on("cpu", torch.bfloat16))
    # The reasons behind the GPU's: everything that a launch looks at.
    monkeypatch.setattr(triton_flash.hopper, "unsupported_reason", lambda query, bias: None)
    monkeypatch.setattr(triton_flash, "unsupported_reason", lambda inputs: None)

    def reason(length=4096, padded=False, **kind):
        query = torch.empty(1, 4, length, 64, device="meta", dtype=torch.bfloat16)
        mask = torch.empty(1, length, device="meta", dtype=torch.bool) if padded else None
        pattern = Pattern.compose(**kind)
        return triton_flash.Hopper.unsupported_reason(
            replace(on_gpu, query=query, key=query, value=query, mask=mask).with_spec(pattern=pattern)
        )

    assert reason(segment_lengths=(1024, 4096), dilation_rates=(1, 4)) is None
    assert reason(window=512) is None
    assert reason(segment_lengths=(1024, 4096), dilation_rates=(1, 4), padded=True) is None
    assert reason(window=512, padded=True) is None
    assert reason(segment_lengths=None, dilation_rates=4, window=512, dilated_queries=False) is None
    assert "too short" in reason(segment_lengths=16, dilation_rates=4)
    assert "without end" in reason(segment_lengths=1024, dilation_rates=4, dilated_queries=False)
    assert "blocks of" in reason(segment_lengths=None, dilation_rates=4, dilated_queries=False, dilation_block=3)
    assert "bands of all queries" in reason(segment_lengths=1024, dilation_rates=4, dilation_block=16)
    assert reason(length=0, window=512) is None
