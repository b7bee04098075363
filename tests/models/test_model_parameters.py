"""Every parameter has a gradient after one backward pass: DistributedDataParallel waits for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longnet import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.compress import prune_heads

OPTIONS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2, "bias": False, "use_xpos": False},
    {"qk_norm": True, "norm": "rms", "use_rel_pos_bias": True},
    {"gradient_checkpointing": True, "tie_embeddings": False, "dropout": 0.1},
    {"feed_forward_chunk": 7, "head_offsets": "blocked"},
]
TOKENS = torch.arange(80).view(2, 40)
MASK = torch.arange(40) >= torch.tensor([[40], [33]])


def without_gradient(model: nn.Module, loss: Tensor) -> list[str]:
    loss.backward()
    return [name for name, weight in model.named_parameters() if weight.grad is None]


def embeddings() -> Tensor:
    return torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_of_a_language_model(options: dict[str, Any], pruned: bool) -> None:
    model = LongNetLM(LongNetConfig.preset("nano", **options))
    if pruned:
        model = prune_heads(model, {0: [0, 1], 1: [2, 3]})
    assert without_gradient(model, model.loss(TOKENS, TOKENS, key_padding_mask=MASK)) == []


@pytest.mark.parametrize("given", ["tokens", "embeddings"])
@pytest.mark.parametrize("options", [*OPTIONS[:-1], {"norm": "batch"}], ids=str)
def test_of_an_encoder(options: dict[str, Any], given: str) -> None:
    model = LongNetEncoder(LongNetConfig.preset("nano", causal=False, **options))
    inputs = {"tokens": TOKENS} if given == "tokens" else {"embeddings": embeddings()}
    assert without_gradient(model, model(key_padding_mask=MASK, **inputs).square().sum()) == []


def test_an_unread_table_changes_nothing_and_can_be_left_out() -> None:
    model = LongNetEncoder(LongNetConfig.preset("nano", causal=False))
    x = embeddings()
    with torch.no_grad():
        expected = model(embeddings=x)
    out = model(embeddings=x)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert model.embedding.weight.grad is not None and not model.embedding.weight.grad.any()
    model.zero_grad()
    model.embedding.requires_grad_(False)
    model(embeddings=x).square().sum().backward()
    assert model.embedding.weight.grad is None


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_an_encoder_of_embeddings_trains_in_ddp() -> None:
    model = DistributedDataParallel(LongNetEncoder(LongNetConfig.preset("nano", causal=False)))
    for _ in range(2):  # the second forward raises where a gradient was missing
        model(embeddings=embeddings()).square().sum().backward()
