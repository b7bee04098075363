"""Training a LongNet: data, loop, checkpoints, evaluation, report.

Needs numpy, safetensors, rich and matplotlib besides torch; ``import longnet`` does not import this package.
"""

import sys
from typing import TYPE_CHECKING

# The longnet command reads the settings, to answer --help, before torch is imported; it takes the rest from its modules.
if TYPE_CHECKING or "torch" in sys.modules:
    from longnet.training.checkpoint import CheckpointError
    from longnet.training.data import Corpus, read_corpus
    from longnet.training.folder import load_model, save_model
    from longnet.training.loop import train
    from longnet.training.models import read_transformer
    from longnet.training.report import Evaluation, write_report
    from longnet.training.settings import TrainSettings
    from longnet.training.trainer import TrainingDiverged, TrainSummary
    from longnet.training.transformer_config import TransformerConfig

__all__ = [
    "CheckpointError",
    "Corpus",
    "Evaluation",
    "TrainSettings",
    "TrainSummary",
    "TrainingDiverged",
    "TransformerConfig",
    "load_model",
    "read_corpus",
    "read_transformer",
    "save_model",
    "train",
    "write_report",
]
