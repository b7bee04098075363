"""Reading forever in constant memory: the keys and values that later tokens can reach, and attention over chunks."""

from longnet.attention.streaming.attend import stream_attention, stream_attention_warned
from longnet.attention.streaming.cache import DilatedCache

__all__ = ["DilatedCache", "stream_attention", "stream_attention_warned"]
