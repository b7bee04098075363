"""Smaller models: heads pruned by importance, weights quantised, training that knows it will be quantised.

Pruning needs torch alone; quantisation needs torchao (the extra ``quant``). Weights are pruned one by one with
``torch.nn.utils.prune``, which takes the models as they are.
"""

from longnet.compress.heads import head_importance, least_important, prune_heads
from longnet.compress.quantized import SCHEMES, convert_qat, prepare_qat, quantization, quantize

__all__ = [
    "SCHEMES",
    "convert_qat",
    "head_importance",
    "least_important",
    "prepare_qat",
    "prune_heads",
    "quantization",
    "quantize",
]
