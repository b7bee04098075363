"""Reading forever in constant memory: the keys and values that later tokens can reach, and attention over chunks."""

from longnet.streaming.attend import stream_attention
from longnet.streaming.cache import DilatedCache

__all__ = ["DilatedCache", "stream_attention"]
