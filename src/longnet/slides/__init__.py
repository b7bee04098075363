"""Slides as files: tile embeddings read from four formats, results written as safetensors, heat maps as PNG."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

# The longnet command reads the settings of fine-tuning, to answer --help, before torch is imported.
if TYPE_CHECKING or "torch" in sys.modules:
    from longnet.slides.files import SLIDE_FORMATS, Slide, is_made_from, read_slide, result_bytes
    from longnet.slides.heatmap import heatmap
    from longnet.slides.patients import join_slides, read_patients

__all__ = [
    "SLIDE_FORMATS",
    "Slide",
    "heatmap",
    "is_made_from",
    "join_slides",
    "read_patients",
    "read_slide",
    "result_bytes",
]
