"""The usage texts that LongNet's users know, word for word: every snippet runs as written."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn as nn

import LongNet
import longnet

CREATE = """
dilated_attn = DilatedAttention(dim=512, heads=8, dilation_rate=2, segment_size=64, dropout=0.1, causal=True, use_xpos=False, use_rel_pos_bias=False)
"""

FORWARD = """
import torch

# Assume x is your input tensor with shape (batch_size, sequence_length, dim)
x = torch.rand(16, 1000, 512).to(device)

output = dilated_attn(x)
"""

TRANSFORMER = """
class SimpleTransformer(nn.Module):
    def __init__(self, dim, heads, dilation_rate, segment_size, dropout):
        super().__init__()

        self.dilated_attn = DilatedAttention(dim, heads, dilation_rate, segment_size, dropout, causal=True, use_xpos=False, use_rel_pos_bias=False)
        self.fc = nn.Linear(dim, 10)  # Assume we're doing a 10-class classification task

    def forward(self, x):
        x = self.dilated_attn(x)
        x = self.fc(x[:, 0])  # Use the first position output as the "CLS" token
        return x

model = SimpleTransformer(dim=512, heads=8, dilation_rate=2, segment_size=64, dropout=0.1)
"""

USAGE = """
import torch
from LongNet import DilatedAttention

# Create a DilatedAttention module
dilated_attention = DilatedAttention(dim=512, heads=8, dilation_rate=2, segment_size=16)

# Generate random input tensor
batch_size = 4
sequence_length = 32
dim = 512
input_tensor = torch.randn(batch_size, sequence_length, dim)

# Apply dilated attention to the input tensor
output_tensor = dilated_attention(input_tensor)

# Print the shape of the output tensor
print(output_tensor.shape)
"""


def namespace() -> dict[str, object]:
    return {"DilatedAttention": LongNet.DilatedAttention, "nn": nn, "device": "cpu"}


def test_creating_an_instance_and_the_forward_pass():
    scope = namespace()
    exec(CREATE, scope)
    exec(FORWARD, scope)
    assert scope["output"].shape == (16, 1000, 512)
    assert scope["output"].isfinite().all()
    assert scope["dilated_attn"].causal


def test_the_simple_transformer_classifies_and_learns():
    scope = namespace()
    exec(TRANSFORMER, scope)
    model = scope["model"]
    logits = model(torch.rand(2, 1000, 512))
    assert logits.shape == (2, 10)
    logits.logsumexp(-1).sum().backward()
    assert model.dilated_attn.v_proj.weight.grad.abs().sum() > 0


def test_the_usage_example_prints_the_shape(capsys):
    exec(USAGE, {})
    assert capsys.readouterr().out == "torch.Size([4, 32, 512])\n"


def test_both_constructors_and_their_positional_order():
    """``(..., causal, ...)`` of one text and ``(..., casual, ..., Distributed)`` of the other."""
    names = list(inspect.signature(LongNet.DilatedAttention).parameters)
    assert names[:9] == [
        "dim",
        "heads",
        "dilation_rate",
        "segment_size",
        "dropout",
        "causal",
        "use_xpos",
        "use_rel_pos_bias",
        "distributed",
    ]
    first = LongNet.DilatedAttention(
        dim=64,
        heads=4,
        dilation_rate=2,
        segment_size=16,
        dropout=0.0,
        causal=True,
        use_xpos=False,
        use_rel_pos_bias=False,
    )
    second = LongNet.DilatedAttention(
        dim=64,
        heads=4,
        dilation_rate=2,
        segment_size=16,
        dropout=0.0,
        casual=True,
        use_xpos=False,
        use_rel_pos_bias=False,
        Distributed=False,
    )
    positional = LongNet.DilatedAttention(64, 4, 2, 16, 0.0, True, False, False, False)
    assert first.causal and second.causal and positional.causal
    second.load_state_dict(first.state_dict())
    positional.load_state_dict(first.state_dict())
    x = torch.randn(2, 40, 64)
    assert torch.equal(first(x), second(x)) and torch.equal(first(x), positional(x))


def test_the_other_import_name_is_the_same_class():
    assert LongNet.DilatedAttention is longnet.DilatedAttention


def test_distributed_without_a_process_group_says_what_to_do():
    for spelling in ("distributed", "Distributed"):
        with pytest.raises(ValueError, match="init_process_group"):
            LongNet.DilatedAttention(64, 4, 2, 16, **{spelling: True})


def test_distributed_in_a_group_of_one_rank_is_the_plain_module():
    plain = LongNet.DilatedAttention(64, 4, 2, 16)
    x = torch.randn(2, 40, 64)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module = LongNet.DilatedAttention(64, 4, 2, 16, Distributed=True)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(x), plain(x))
    finally:
        torch.distributed.destroy_process_group()
