"""Small random models of Hugging Face, and what one layer of dilated attention should give in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 40
_SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama(**changes: Any) -> PreTrainedModel:
    config = transformers.LlamaConfig(**{**_SIZE, **_TEXT, "num_key_value_heads": 2, **changes})
    return transformers.LlamaForCausalLM(config)


def qwen2(**changes: Any) -> PreTrainedModel:
    config = transformers.Qwen2Config(**{**_SIZE, **_TEXT, "num_key_value_heads": 2, **changes})
    return transformers.Qwen2ForCausalLM(config)


def qwen3(**changes: Any) -> PreTrainedModel:
    config = transformers.Qwen3Config(**{**_SIZE, **_TEXT, "num_key_value_heads": 1, "head_dim": 16, **changes})
    return transformers.Qwen3ForCausalLM(config)


def mistral(**changes: Any) -> PreTrainedModel:
    config = transformers.MistralConfig(
        **{**_SIZE, **_TEXT, "num_key_value_heads": 2, "sliding_window": None, **changes}
    )
    return transformers.MistralForCausalLM(config)


def gpt2(**changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
    names: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dropout: dict[str, Any] = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **names, **dropout, **changes}))


def bert(**changes: Any) -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**{**_SIZE, **_TEXT, **_NO_DROPOUT, **changes}))


def vit(**changes: Any) -> PreTrainedModel:
    config = transformers.ViTConfig(**{**_SIZE, **_NO_DROPOUT, "image_size": 24, "patch_size": 4, **changes})
    return transformers.ViTForImageClassification(config)


DECODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama, "qwen2": qwen2, "qwen3": qwen3, "mistral": mistral, "gpt2": gpt2,
}  # fmt: skip
MODELS = {**DECODERS, "bert": bert, "vit": vit}


def make(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name](**changes).eval()
    # Positions and padding should matter: first weights of these classes are small.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def inputs(name: str, batch: int = 2, length: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def logits(model: PreTrainedModel, given: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**given, **options).logits
