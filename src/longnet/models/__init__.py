"""The LongNet models in plain torch: a decoder language model, an encoder, and their config."""

from longnet.models.cache import LongNetCache
from longnet.models.config import LongNetConfig
from longnet.models.longnet import LongNetEncoder, LongNetLM

__all__ = ["LongNetCache", "LongNetConfig", "LongNetEncoder", "LongNetLM"]
