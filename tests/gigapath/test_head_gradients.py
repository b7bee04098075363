"""Every parameter that a head trains has a gradient, and no block is computed for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from slides import encoder, slides
from torch.nn.parallel import DistributedDataParallel

from longnet.gigapath import ClassificationHead


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("layers", [(-1,), (0,), (1,), (0, 2), (3, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("global_pool", [False, True])
def test_what_requires_a_gradient_gets_one(global_pool: bool, layers: tuple[int, ...], freeze: bool) -> None:
    model = encoder(3, torch.float32, global_pool=global_pool, dropout=0.0, drop_path=0.0)
    expected = model(*slides(9, 2, torch.float32), all_layer_embed=True)
    ran: list[int] = []
    for number, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    head = ClassificationHead(model, 2, layers=layers, freeze=freeze).train()
    logits = head(*slides(9, 2, torch.float32))
    torch.testing.assert_close(logits, head.linear(torch.cat([expected[layer] for layer in layers], dim=-1)))
    logits.square().sum().backward()
    trained = {name for name, one in head.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in head.named_parameters() if one.grad is not None}
    last = max(layer % 4 for layer in layers)
    assert ran == list(range(1, last + 1))
    assert any(name.startswith("encoder.norm") for name in trained) is not freeze
    assert freeze or {int(name.split(".")[2]) for name in trained if ".blocks." in name} == set(range(last))


@pytest.mark.parametrize("global_pool", [False, True])
def test_an_encoder_without_a_head_gets_every_gradient(global_pool: bool) -> None:
    model = encoder(2, torch.float32, global_pool=global_pool).train()
    model(*slides(9, 2, torch.float32))[0].square().sum().backward()
    assert all(one.grad is not None for one in model.parameters())


@pytest.mark.parametrize("layers", [(-1,), (1,), (0,)])
def test_replicas_of_a_head_train(layers: tuple[int, ...], one_rank: None) -> None:
    head = ClassificationHead(encoder(2, torch.float32), 2, layers=layers).train()
    replica = DistributedDataParallel(head)
    optimizer = torch.optim.SGD([one for one in head.parameters() if one.requires_grad], lr=0.1)
    losses = []
    # A pass whose gradients are not all there makes the next one raise.
    for _ in range(3):
        torch.manual_seed(0)
        loss = head.loss(replica(*slides(9, 2, torch.float32)), torch.tensor([0, 1]))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
