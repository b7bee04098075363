"""Hugging Face: dilated attention in any of its transformers."""

from longnet.hf.dilation import BoundedCache, apply, load, restore

__all__ = ["BoundedCache", "apply", "load", "restore"]
