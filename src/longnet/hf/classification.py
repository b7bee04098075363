"""A class, or numbers, for a whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from longnet.hf.configuration import LongNetConfig
from longnet.hf.modeling import LongNetModel, LongNetPreTrainedModel


class LongNetForSequenceClassification(LongNetPreTrainedModel):
    """A class per row, or numbers: a linear layer on the last real token of a decoder, on the mean of an encoder's real ones."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels). Without ``attention_mask`` all tokens are real.

        Args:
            labels: (B,) int64, or floats (B,) or (B, num_labels), as ``config.problem_type`` wants.
        """
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        hidden = out.last_hidden_state
        real = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else (attention_mask != 0).to(hidden.dtype)
        if self.config.is_causal:
            last = (real * torch.arange(hidden.shape[1], device=hidden.device)).argmax(1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        else:
            pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states)
