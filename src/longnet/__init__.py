"""Dilated attention (LongNet, arXiv 2307.02486), exact and linear in length."""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING


def _starts_the_command() -> bool:
    """Whether this is ``python -m longnet`` or the ``longnet`` command.

    They set up torch's threads, and answer ``--help``, before torch is imported.
    """
    if sys.argv[:1] == ["-m"]:
        # While Python looks for the module that it was asked to run, which may belong to another package.
        asked = sys.orig_argv[-len(sys.argv) :][:1]
        return asked in (["longnet"], ["-mlongnet"])
    return bool(sys.argv) and PurePath(sys.argv[0]).stem == "longnet"


if TYPE_CHECKING or not _starts_the_command():
    from longnet import geometry
    from longnet.attention import DilatedAttention
    from longnet.attention.functional import dilated_attention
    from longnet.attention.streaming import DilatedCache, stream_attention
    from longnet.models import LongNetConfig, LongNetEncoder, LongNetLM

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
