"""A class, or numbers, for a whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from longnet.hf.configuration import LongNetConfig
from longnet.hf.inputs import as_int64
from longnet.hf.modeling import LongNetModel, LongNetWithHead
from longnet.hf.transformers_internals import ForSequenceClassificationLoss


class LongNetForSequenceClassification(LongNetWithHead):
    """A class per row, or numbers: a linear layer on the last real token of a decoder, on the mean of an encoder's real ones.

    It takes ``input_ids``, ``attention_mask``, ``position_ids`` and ``inputs_embeds`` as :class:`LongNetModel` does, and
    ``labels``: (B,) int64 or int32, or floats (B,) or (B, num_labels), as ``config.problem_type`` wants. Logits are
    (B, num_labels). Without ``attention_mask`` a decoder's last real token is the last id other than ``config.pad_token_id``
    (the last token of ``inputs_embeds``), and an encoder reads all tokens. The loss is the mean over the labels, or with
    ``num_items_in_batch`` (labels of all accumulated batches) their sum over that number.
    """

    _output_class = SequenceClassifierOutputWithPast

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.loss_function = _loss
        self.post_init()

    def _logits(self, hidden: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        pad = self.config.pad_token_id
        if padding is None and input_ids is not None and pad is not None and self.config.is_causal:
            # As transformers' own classifiers do.
            padding = input_ids == pad
        logits: Tensor = self.score((_last if self.config.is_causal else _mean)(hidden, padding))
        return logits

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)


# Positions and counts are integers and sums float32 at least: bfloat16 holds no odd integer above 256.
def _last(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """Hidden states of each row's last real token, (B, C)."""
    if padding is None:
        return hidden[:, -1]
    last = (~padding * torch.arange(hidden.shape[1], device=hidden.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _mean(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """The mean over each row's real tokens, (B, C)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if padding is None:
        return hidden.mean(1, dtype=wide).to(hidden.dtype)
    count = (~padding).sum(1, keepdim=True).clamp(min=1)
    return (hidden.masked_fill(padding[..., None], 0).sum(1, dtype=wide) / count).to(hidden.dtype)


def _loss(
    labels: Tensor, pooled_logits: Tensor, config: LongNetConfig, num_items_in_batch: Any = None, **kwargs: Any
) -> Tensor:
    """transformers' loss, in float32 at least. Its own leaves the number of items out of all losses but one."""
    logits = pooled_logits.to(torch.promote_types(pooled_logits.dtype, torch.float32))
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    loss: Tensor = ForSequenceClassificationLoss(
        as_int64(labels), logits, config, num_items_in_batch=num_items_in_batch, **kwargs
    )
    if num_items_in_batch is None or config.problem_type == "single_label_classification":
        return loss
    return loss * labels.numel() / torch.as_tensor(num_items_in_batch, device=loss.device)
