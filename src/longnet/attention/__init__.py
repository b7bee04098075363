"""One exact operation, dilated attention: as a function, a module, over documents, over ranks and over a stream."""

from longnet.attention.module import DilatedAttention

__all__ = ["DilatedAttention"]
