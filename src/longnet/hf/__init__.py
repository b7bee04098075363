"""Hugging Face: LongNet's models there, and dilated attention in any of its transformers."""

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"longnet.hf needs {error.name}, which is not installed: pip install '.[hf]' in a checkout of longnet",
        name=error.name,
    ) from error

from longnet.hf.attend import attention
from longnet.hf.bounded import BoundedCache
from longnet.hf.cache import LongNetCache
from longnet.hf.classification import LongNetForSequenceClassification
from longnet.hf.configuration import LongNetConfig
from longnet.hf.dilation import apply, load, restore
from longnet.hf.folders import save_remote_code
from longnet.hf.language import LongNetForCausalLM, LongNetForMaskedLM
from longnet.hf.layers import NAME
from longnet.hf.masks import document_mask
from longnet.hf.modeling import LongNetModel
from longnet.hf.runs import from_run
from longnet.hf.tokenizer import LongNetByteTokenizer
from longnet.hf.transformers_internals import name_classes

AutoConfig.register("longnet", LongNetConfig)
AutoModel.register(LongNetConfig, LongNetModel)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM)
AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM)
AutoModelForSequenceClassification.register(LongNetConfig, LongNetForSequenceClassification)
AutoTokenizer.register(LongNetConfig, LongNetByteTokenizer)
name_classes(
    "longnet",
    causal_lm="LongNetForCausalLM",
    masked_lm="LongNetForMaskedLM",
    sequence_classification="LongNetForSequenceClassification",
)
# Here, because unpickling a dilated model imports this package and does not call ``apply``. Without a mask of the same name
# transformers' models pass no mask at all.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, document_mask)

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
    "from_run",
    "load",
    "restore",
    "save_remote_code",
]
