"""The library on a device without float64: no step makes a float64 tensor there."""

from __future__ import annotations

import pytest
import torch
from calls import call
from no_float64 import NoFloat64

from longnet import DilatedAttention, LongNetConfig, LongNetEncoder, LongNetLM, dilated_attention
from longnet.attention.backends import portable
from longnet.attention.call import SavedForward
from longnet.compat import torchscale_attention
from longnet.compress import prune_heads
from longnet.geometry import Pattern
from longnet.gigapath import SlideEncoder
from longnet.nn.position import XPos, xpos
from longnet.reading.reader import StreamReader

PATTERN = (8, 16), (1, 2)
CONFIG = LongNetConfig(vocab_size=256, dim=32, heads=4, layers=2, segment_lengths=PATTERN[0], dilation_rates=PATTERN[1])
TOKENS = torch.zeros(2, 20, dtype=torch.int64, device="meta")
MASK = torch.zeros(2, 20, dtype=torch.bool, device="meta")


@pytest.fixture(autouse=True)
def no_float64():
    with NoFloat64():
        yield


def test_the_device_refuses_float64():
    for make in (lambda: torch.zeros(2, device="meta").double(), lambda: torch.zeros(2).double().to("meta")):
        with pytest.raises(TypeError, match="float64 tensor on a device that has none"):
            make()


def test_the_operation():
    q = torch.randn(2, 4, 20, 8, device="meta", requires_grad=True)
    dilated_attention(q, q, q, *PATTERN, is_causal=True, key_padding_mask=MASK).sum().backward()
    torchscale_attention(q, q, q, (8, 15), (1, 2)).sum().backward()
    # On meta an operator gives shapes alone, so here is what it runs elsewhere.
    q, bias = q.detach(), torch.randn(4, 41, device="meta")
    inputs = call(q, q, q, Pattern.parse(*PATTERN), True, 0.5, mask=MASK, bias=bias)
    out, lse = portable.forward(inputs)
    portable.backward(SavedForward(inputs, out, lse), out, lse)


@pytest.mark.parametrize("options", [dict(use_xpos=True), dict(use_rel_pos_bias=True, qk_norm=True)])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 20]])
def test_the_module(options, cu_seqlens):
    module = DilatedAttention(32, 4, *reversed(PATTERN), device="meta", **options)
    module(torch.randn(1, 20, 32, device="meta"), cu_seqlens=cu_seqlens).sum().backward()


def test_a_language_model():
    model = LongNetLM(CONFIG, device="meta")
    model.loss(TOKENS, TOKENS, key_padding_mask=MASK).backward()
    cache = model.new_cache(2)
    for tokens in (5, 1, 1, 11, 1):
        model.hidden(TOKENS[:, :tokens], cache=cache)
    assert cache.position == 19
    assert model.generate(TOKENS, 3, top_k=5, top_p=0.9).shape == (2, 23)


def test_an_encoder():
    LongNetEncoder(CONFIG.replace(causal=False), device="meta")(TOKENS, MASK).sum().backward()


@pytest.mark.parametrize("torchscale_compat", [False, True])
def test_a_slide_encoder(torchscale_compat):
    model = SlideEncoder(32, 2, 4, in_dim=24, torchscale_compat=torchscale_compat, slide_ngrids=20, device="meta")
    x, coords = torch.randn(1, 30, 24, device="meta"), torch.zeros(1, 30, 2, device="meta")
    model(x, coords)[0].sum().backward()
    assert model.attention_weights(x, coords).shape == (2, 1, 4, 30)


def test_pruning():
    model = LongNetLM(CONFIG.replace(norm="layer"), device="meta")
    assert prune_heads(model, {0: [1]}).blocks[0].attention.heads == 3


def test_a_reader():
    StreamReader(LongNetLM(CONFIG, device="meta")).read(TOKENS[0])


@pytest.mark.parametrize("start", [0, 10**9])
def test_tables_made_elsewhere_are_the_same(monkeypatch, start):
    """A step's position is a tensor on the device and a number on the host."""
    tables = XPos(8, Pattern.parse(*PATTERN), True)
    counter = torch.tensor(start)
    expected = tables.tables(3, torch.float32, "cpu", start, streaming=True, counter=counter)
    monkeypatch.setattr(xpos, "float64_device", lambda device: torch.device("cpu", 0))
    got = tables.tables(3, torch.float32, "cpu", start, streaming=True, counter=counter)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
