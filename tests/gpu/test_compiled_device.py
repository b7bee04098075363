"""Models in torch's compiler with CUDA graphs (``mode="reduce-overhead"``): what they give without it."""

from __future__ import annotations

import pytest
import torch

from longnet import LongNetConfig, LongNetLM

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's compiler has much to say of itself.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KINDS = {
    "published": {"segment_lengths": (256, 512, 2048), "dilation_rates": (1, 2, 4)},
    "types": {"layer_types": ("sliding_attention", "strided_attention"), "sliding_window": 100, "stride": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(kind: str) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig(layers=2, dim=256, heads=4, vocab_size=97, **KINDS[kind])).cuda()


def windows(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(97, (2, 1025), generator=torch.Generator().manual_seed(number)).cuda()
    return ids[:, :-1], ids[:, 1:]


def trained(kind: str, compiled: bool) -> tuple[list[float], LongNetLM]:
    model = model_of(kind)
    loss_of = torch.compile(model.loss, mode="reduce-overhead") if compiled else model.loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(6):
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(*windows(step))
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_steps_are_those_of_no_compiler(kind):
    got, got_model = trained(kind, True)
    want, model = trained(kind, False)
    assert got == pytest.approx(want, rel=2e-3)
    start = model_of(kind)
    for (name, one), other, begun in zip(
        got_model.named_parameters(), model.parameters(), start.parameters(), strict=True
    ):
        moved = (other - begun).norm()
        assert moved > 0
        assert (one - other).norm() <= 5e-2 * moved, name


@pytest.mark.parametrize("kind", list(KINDS))
def test_hidden_states_are_those_of_no_compiler(kind):
    model = model_of(kind).bfloat16().eval()
    compiled = torch.compile(model.hidden, mode="reduce-overhead")
    with torch.no_grad():
        for number in range(4):
            tokens, _ = windows(number)
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(tokens).float()
            want = model.hidden(tokens).float()
            assert (got - want).norm() <= 2e-2 * want.norm()
