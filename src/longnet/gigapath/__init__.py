"""Prov-GigaPath's slide encoder on any device: the same outputs from the same checkpoint, without flash-attn."""

from longnet.gigapath.architectures import ARCHITECTURES
from longnet.gigapath.encoder import SlideEncoder
from longnet.gigapath.finetuned import from_finetuned
from longnet.gigapath.groups import param_groups_lrd
from longnet.gigapath.heads import ClassificationHead, RegressionHead, SurvivalHead
from longnet.gigapath.outputs import slide_outputs
from longnet.gigapath.upstream import drop_in

__all__ = [
    "ARCHITECTURES",
    "ClassificationHead",
    "RegressionHead",
    "SlideEncoder",
    "SurvivalHead",
    "drop_in",
    "from_finetuned",
    "param_groups_lrd",
    "slide_outputs",
]
