"""What other projects' checkpoints were trained with: torchscale's attention, and its LongNet, decoder and LongViT."""

from longnet.compat.attention import torchscale_attention
from longnet.compat.torchscale import (
    LongViT,
    decoder_from_torchscale,
    encoder_from_torchscale,
    longvit_from_torchscale,
    to_torchscale,
)

__all__ = [
    "LongViT",
    "decoder_from_torchscale",
    "encoder_from_torchscale",
    "longvit_from_torchscale",
    "to_torchscale",
    "torchscale_attention",
]
