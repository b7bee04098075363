"""Steps around matrix products, each in one pass over memory: Triton kernels, where they fit."""

from longnet.fused.fade import fade_
from longnet.fused.gelu_norm import fits, gelu_norm

__all__ = ["fade_", "fits", "gelu_norm"]
