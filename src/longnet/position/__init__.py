"""Positions: xPos rotates q and k, the relative bias is added to the scores."""

from longnet.position.relative_bias import RelativeBias, relative_buckets
from longnet.position.xpos import XPos, rotate

__all__ = ["RelativeBias", "XPos", "relative_buckets", "rotate"]
