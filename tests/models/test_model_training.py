"""The models under a compiler and under an optimiser."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.models.layers import Block, FeedForward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_compiles_into_one_graph(checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = LongNetConfig.preset("nano", layers=1 + checkpointing, gradient_checkpointing=checkpointing)
    model = LongNetLM(config, dtype=torch.float64)
    eager = copy.deepcopy(model)
    tokens = torch.randint(0, 256, (2, 41))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(tokens[:, :-1], tokens[:, 1:]), eager.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_batch_norm_encoder_compiles_and_moves_its_statistics_once(checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = LongNetConfig.preset(
        "nano", layers=2 - checkpointing, causal=False, norm="batch", gradient_checkpointing=checkpointing
    )
    model = LongNetEncoder(config, dtype=torch.float64)
    eager = copy.deepcopy(model)
    tokens = torch.randint(0, 256, (2, 40))
    mask = torch.arange(40)[None] >= torch.tensor([[40], [17]])
    for encoder in (torch.compile(model, fullgraph=True, backend="aot_eager"), eager):
        encoder(tokens, mask).pow(3).sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for (name, p), (_, q) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_low_precision_rounds_a_float32_once(dtype: torch.dtype) -> None:
    """What the feed-forward relies on to leave out the casts, at every normal value of the type.

    Torch's float32 itself is no reference: its last bits differ between processors and between its own two kernels.
    """
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    # At both ends of float32, which are bfloat16's too, products overflow or vanish on the way.
    kind = torch.finfo(dtype)
    every = every[every.isfinite() & (every.abs() > 4 * kind.tiny) & (every.abs() < kind.max / 4)]
    exact = every.double() * torch.special.ndtr(every.double())
    one_rounding = kind.eps / 2 * exact.abs().clamp(min=kind.tiny)
    # For negative values 1 + erf(x) cancels, so an error of float32 is relative to x.
    float32 = 4 * torch.finfo(torch.float32).eps * every.double().abs()
    assert ((F.gelu(every).double() - exact).abs() <= one_rounding + float32).all()


def test_feed_forward_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = FeedForward(LongNetConfig.preset("nano"), dtype=torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    hidden = x @ layer.fc1.weight.t() + layer.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), normed @ layer.fc2.weight.t() + layer.fc2.bias, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_dropout_acts_on_each_residual_branch(branch: str) -> None:
    """With the other branch silent, every output is the input plus either nothing or twice the branch."""
    torch.manual_seed(0)
    block = Block(LongNetConfig.preset("nano", dropout=0.5), dtype=torch.float64)
    for parameter in (block.feed_forward.fc2 if branch == "attention" else block.attention.out_proj).parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    added, full = block(x) - x, block.eval()(x) - x
    dropped = added.abs() < 1e-12
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(added[~dropped], 2 * full[~dropped], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_overfits_one_sequence(norm: str) -> None:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano", norm=norm))
    tokens = torch.randint(0, 256, (1, 97))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5.0 and losses[-1] < 0.5, losses
    continued = model.generate(tokens[:, :40], 57, temperature=0)
    assert (continued == tokens).float().mean() > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_feed_forward_in_chunks_is_the_whole(checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = LongNetConfig.preset("nano", gradient_checkpointing=checkpointing)
    whole = LongNetLM(config, dtype=torch.float64)
    chunked = LongNetLM(config.replace(feed_forward_chunk=16), dtype=torch.float64)
    chunked.load_state_dict(whole.state_dict())
    tokens = torch.randint(0, 256, (2, 42))  # 41 tokens: two chunks and a rest
    loss, expected = (model.loss(tokens[:, :-1], tokens[:, 1:]) for model in (chunked, whole))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for p, q in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(chunked(tokens), whole(tokens), rtol=1e-12, atol=1e-12)


def test_a_recomputed_block_in_chunks_keeps_no_input_of_its_feed_forward() -> None:
    model = LongNetLM(LongNetConfig.preset("nano", gradient_checkpointing=True, feed_forward_chunk=16))
    inputs: list[weakref.ref[torch.Tensor]] = []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda module, given: inputs.append(weakref.ref(given[0])))
    tokens = torch.randint(0, 256, (1, 65))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert len(inputs) == len(model.blocks) and all(one() is None for one in inputs)
    loss.backward()
    assert len(inputs) == 2 * len(model.blocks) and all(one() is None for one in inputs)


def test_gradients_of_chunks_can_be_taken_again_and_of_gradients() -> None:
    torch.manual_seed(0)
    config = LongNetConfig.preset("nano")
    whole = FeedForward(config, dtype=torch.float64)
    chunked = FeedForward(config.replace(feed_forward_chunk=16), dtype=torch.float64)
    chunked.load_state_dict(whole.state_dict())
    x = torch.randn(2, 41, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (chunked, whole):
        y = layer(x).square().sum()
        # Of one weight, then of all: a part is computed again for each.
        (last,) = torch.autograd.grad(y, [layer.fc2.weight], retain_graph=True)
        (own,) = torch.autograd.grad(y, [x], create_graph=True)
        own.square().sum().backward()
        found.append([last, own.detach(), *(weight.grad for weight in layer.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_tangents_pass_through_chunks() -> None:
    torch.manual_seed(0)
    config = LongNetConfig.preset("nano")
    whole, chunked = FeedForward(config), FeedForward(config.replace(feed_forward_chunk=16))
    chunked.load_state_dict(whole.state_dict())
    x, tangent = torch.randn(2, 1, 41, 32)
    found = []
    for layer in (chunked, whole):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            try:
                checkpoint(torch.sin, dual, use_reentrant=False)
            except NotImplementedError:
                pytest.skip("this torch's checkpoint takes no tangents")
            found.append(forward_ad.unpack_dual(layer(dual)).tangent.detach())
    torch.testing.assert_close(*found)


def test_a_chunked_feed_forward_keeps_its_input_alone() -> None:
    kept: list[torch.Tensor] = []
    layer = FeedForward(LongNetConfig.preset("nano", feed_forward_chunk=16))
    x = torch.randn(1, 64, 32, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {weight.data_ptr() for weight in layer.parameters()}
    tokens = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in kept
        if tensor.data_ptr() not in own
    }
    assert sum(tokens.values()) <= x.nbytes
