"""Reading forever in constant memory: the keys and values that later tokens can reach, and attention over chunks."""

from longnet.attention.streaming.attend import stream_attention, stream_attention_warned
from longnet.attention.streaming.cache import DilatedCache, most_padding

__all__ = ["DilatedCache", "most_padding", "stream_attention", "stream_attention_warned"]
