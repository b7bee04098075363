"""Prov-GigaPath's slide encoder on any device: the same outputs from the same checkpoint, without flash-attn."""

from longnet.gigapath.architectures import ARCHITECTURES
from longnet.gigapath.encoder import SlideEncoder
from longnet.gigapath.heads import ClassificationHead, RegressionHead, SurvivalHead

__all__ = ["ARCHITECTURES", "ClassificationHead", "RegressionHead", "SlideEncoder", "SurvivalHead"]
