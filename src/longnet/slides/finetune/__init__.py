"""Fine-tuning a slide encoder on a cohort: folds by patient, baselines on the same folds, a report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from longnet.slides.finetune.settings import FinetuneSettings

# The longnet command reads the settings, to answer --help, before torch is imported.
if TYPE_CHECKING or "torch" in sys.modules:
    from longnet.slides.finetune.outcome import Outcome
    from longnet.slides.finetune.run import finetune

__all__ = ["FinetuneSettings", "Outcome", "finetune"]
