"""Slides as files: tile embeddings read from four formats, results written as safetensors, heat maps as PNG."""

from longnet.slides.files import SLIDE_FORMATS, Slide, read_slide
from longnet.slides.heatmap import heatmap
from longnet.slides.results import is_made_from, result_bytes

__all__ = ["SLIDE_FORMATS", "Slide", "heatmap", "is_made_from", "read_slide", "result_bytes"]
