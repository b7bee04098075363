"""``from LongNet import DilatedAttention``: the name under which LongNet's users first met the module."""

from longnet import DilatedAttention

__all__ = ["DilatedAttention"]
