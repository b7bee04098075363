"""What other projects' checkpoints were trained with: torchscale's attention, and its LongNet, decoder and LongViT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for: ``spellings`` serves modules that these names are built on."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "attention" if name == "torchscale_attention" else "torchscale"
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
