"""Hugging Face models on a device without float64: no step makes a float64 tensor there."""

from __future__ import annotations

import torch
from no_float64 import NoFloat64
from transformers import LlamaConfig, LlamaForCausalLM

from longnet import hf

TOKENS = torch.zeros(2, 20, dtype=torch.int64, device="meta")


def test_longnets_own_model():
    config = hf.LongNetConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, segment_lengths=[8, 16], dilation_rates=[1, 2],
    )  # fmt: skip
    with NoFloat64(), torch.device("meta"):
        model = hf.LongNetForCausalLM(config)
        model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS).loss.backward()


def test_a_dilated_transformer():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2
    )
    with NoFloat64(), torch.device("meta"):
        model = hf.apply(LlamaForCausalLM(config), [8, 16], [1, 2])
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
