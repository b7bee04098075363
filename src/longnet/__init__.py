"""Dilated attention (LongNet, arXiv 2307.02486), exact and linear in length."""

from longnet import geometry
from longnet.attention import DilatedAttention
from longnet.functional import dilated_attention
from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.streaming import DilatedCache, stream_attention

__version__ = "0.1.0"

__all__ = [
    "DilatedAttention",
    "DilatedCache",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetLM",
    "dilated_attention",
    "geometry",
    "stream_attention",
]
