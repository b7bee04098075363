"""Slides as files: tile embeddings read from four formats, results written as safetensors, heat maps as PNG."""

from longnet.slides.files import SLIDE_FORMATS, Slide, is_made_from, read_slide, result_bytes
from longnet.slides.heatmap import heatmap

__all__ = ["SLIDE_FORMATS", "Slide", "heatmap", "is_made_from", "read_slide", "result_bytes"]
