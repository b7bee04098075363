"""Hugging Face: LongNet's models there, and dilated attention in any of its transformers."""

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.models.auto import modeling_auto
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"longnet.hf needs {error.name}, which is not installed: pip install '.[hf]' in a checkout of longnet",
        name=error.name,
    ) from error

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
# Registered classes are not in these. Trainer shifts smoothed labels, and names a card's task, by what they hold.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["longnet"] = "LongNetForCausalLM"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["longnet"] = "LongNetForMaskedLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["longnet"] = "LongNetForSequenceClassification"

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
