"""Hugging Face: LongNet's models there, and dilated attention in any of its transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from longnet.hf.cache import LongNetCache
from longnet.hf.classification import LongNetForSequenceClassification
from longnet.hf.configuration import LongNetConfig
from longnet.hf.dilation import BoundedCache, apply, load, restore
from longnet.hf.folders import save_remote_code
from longnet.hf.language import LongNetForCausalLM, LongNetForMaskedLM
from longnet.hf.modeling import LongNetModel
from longnet.hf.tokenizer import LongNetByteTokenizer

AutoConfig.register("longnet", LongNetConfig)
AutoModel.register(LongNetConfig, LongNetModel)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM)
AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM)
AutoModelForSequenceClassification.register(LongNetConfig, LongNetForSequenceClassification)
AutoTokenizer.register(LongNetConfig, LongNetByteTokenizer)

__all__ = [
    "BoundedCache",
    "LongNetByteTokenizer",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetModel",
    "apply",
    "load",
    "restore",
    "save_remote_code",
]
