"""The path under which :mod:`longnet.nn.position` is documented."""

from longnet.nn.position import RelativeBias, XPos, float64_device, relative_buckets, rotate

__all__ = ["RelativeBias", "XPos", "float64_device", "relative_buckets", "rotate"]
