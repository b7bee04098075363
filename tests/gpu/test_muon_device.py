"""Muon of many matrices on a GPU: the steps of torch.optim.Muon, which takes one after the other."""

from __future__ import annotations

import pytest
import torch

from longnet.training.muon import Muon

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = [(256, 256)] * 5 + [(1024, 256)] * 3 + [(256, 1024)] * 3 + [(48, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_torchs(dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn():
        return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in SHAPES]

    begin = drawn()
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in begin] for _ in range(2))
    batched = Muon(ours, 0.05, 0.1)
    single = torch.optim.Muon(theirs, 0.05, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other, gradient in zip(ours, theirs, drawn(), strict=True):
            mine.grad, other.grad = gradient, gradient.clone()
        batched.step()
        single.step()
    for mine, other, before in zip(ours, theirs, begin, strict=True):
        moved = (other - before).float().norm()
        # Products in bfloat16, added up in another order.
        assert (mine - other).float().norm() < 0.02 * moved and moved > 0
        assert torch.equal(batched.state[mine]["momentum_buffer"], single.state[other]["momentum_buffer"])
