"""Small random LongNets of longnet.hf, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import longnet.hf
from longnet.hf import LongNetConfig

VOCABULARY = 40
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "segment_lengths": (8, 32),
    "dilation_rates": (1, 2),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of a quick run of transformers' Trainer that leaves nothing behind.
QUICK: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
MODELS = ("LongNetModel", "LongNetForCausalLM", "LongNetForSequenceClassification", "LongNetForMaskedLM")
HEADS = MODELS[1:]


def config(name: str = "LongNetForCausalLM", **changes: Any) -> LongNetConfig:
    return LongNetConfig(**{**_SIZE, "is_causal": name != "LongNetForMaskedLM", **changes})


def architecture(name: str) -> Any:
    return getattr(longnet.hf, name)


def make(name: str = "LongNetForCausalLM", **changes: Any) -> Any:
    """A model in evaluation mode whose weights do not depend on what was drawn before."""
    torch.manual_seed(0)
    model = architecture(name)(config(name, **changes)).eval()
    # Classes' scores of a fresh model are too small to tell rows apart.
    if name == "LongNetForSequenceClassification":
        nn.init.normal_(model.score.weight)
    return model


def tokens(batch: int = 3, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def labels(name: str, ids: Tensor) -> Tensor:
    return torch.arange(len(ids)) % 2 if name == "LongNetForSequenceClassification" else ids


def first(model: Any, **given: Any) -> Tensor:
    """Logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        return model(**given)[0]
