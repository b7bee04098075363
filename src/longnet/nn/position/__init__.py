"""Positions: xPos rotates q and k, the relative bias is added to the scores."""

from longnet.nn.position.relative_bias import RelativeBias, relative_buckets
from longnet.nn.position.xpos import Positions, XPos, float64_device, rotate

__all__ = ["Positions", "RelativeBias", "XPos", "float64_device", "relative_buckets", "rotate"]
