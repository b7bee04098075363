"""Steps around matrix products, each in one pass over memory: Triton kernels, where they fit."""

from longnet.nn.dropout_masks import can_draw, keep_masks
from longnet.nn.norm_linear import Norm, normed_linear, residual_normed_linear
from longnet.nn.norm_operators import fits
from longnet.nn.rescale import rescale_

__all__ = ["Norm", "can_draw", "fits", "keep_masks", "normed_linear", "rescale_", "residual_normed_linear"]
