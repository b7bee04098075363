"""Smaller models: heads pruned by importance, weights quantised, quantisation-aware training.

Pruning needs torch alone; quantisation needs torchao (the extra ``quant``). Weights are pruned one by one with
``torch.nn.utils.prune``, which works on these models unchanged.
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
