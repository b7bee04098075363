"""Steps around matrix products, each in one pass over memory: Triton kernels, where they fit."""

from longnet.fused.fade import fade_
from longnet.fused.gelu_norm import fits, gelu_norm
from longnet.fused.masks import can_draw, keep_masks

__all__ = ["can_draw", "fade_", "fits", "gelu_norm", "keep_masks"]
