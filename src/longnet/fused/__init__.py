"""Steps around matrix products, each in one pass over memory: Triton kernels, where they fit."""

from longnet.fused.fade import fade_
from longnet.fused.joined import Norm, normed_linear, residual_normed_linear
from longnet.fused.masks import can_draw, keep_masks
from longnet.fused.norms import fits

__all__ = ["Norm", "can_draw", "fade_", "fits", "keep_masks", "normed_linear", "residual_normed_linear"]
