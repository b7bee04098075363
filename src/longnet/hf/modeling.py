"""LongNet as Hugging Face's models: thin adapters around the plain stack of blocks, which computes everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from longnet.hf.cache import LongNetCache
from longnet.hf.configuration import LongNetConfig
from longnet.hf.inputs import (
    as_int64,
    documents_of,
    padding_of,
    refuse_exported_documents,
    refuse_misspelt,
    refuse_unknown,
)
from longnet.hf.transformers_internals import CACHE, can_return_tuple, implementation_of, overrides
from longnet.models.base import LongNetBase
from longnet.models.padding import rows_from_start


class LongNetPreTrainedModel(PreTrainedModel):
    """What all LongNets of Hugging Face share: the config, MAGNETO's initialisation, recomputation of blocks."""

    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Attention is LongNet's own: there is nothing to choose.
    _supports_sdpa = False
    _supports_attention_backend = False

    def __init__(self, config: LongNetConfig) -> None:
        _refuse_implementation(implementation_of(config))
        super().__init__(config)

    def set_attn_implementation(self, attn_implementation: Any, allow_all_kernels: bool = False) -> None:
        """Nothing but ``"eager"``, transformers' word for what a model computes by itself."""
        _refuse_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @overrides(PreTrainedModel)
    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code that is not its own transformers skips modules without parameters of their own, the stack among them.
        super()._initialize_weights(module, False)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers guards torch.nn.init meanwhile: weights that were loaded stay as they are.
        if isinstance(module, LongNetBase):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and module in (getattr(self, name, None) for name in ("lm_head", "score")):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)


def _refuse_implementation(name: Any) -> None:
    if name not in (None, "eager"):
        raise ValueError(f"attn_implementation={name!r}: expected 'eager' or None, a LongNet's attention is its own")


class LongNetModel(LongNetPreTrainedModel):
    """The stack without a head: token ids (B, N) to normalised hidden states (B, N, hidden_size).

    A decoder if ``config.is_causal``, else an encoder. Weights are those of :class:`longnet.LongNetLM`, under ``stack``.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.stack = LongNetBase(config.to_longnet())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stack.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.stack.embedding = value
        self.stack.config = self.stack.config.replace(vocab_size=value.num_embeddings)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last block, normalised.

        Args:
            input_ids: (B, N) int64 or int32.
            attention_mask: (B, N), with a cache (B, S) for all S tokens read so far, 0 where a token is padding. A decoder's row
                gives what it gives alone, padded on either side; in an encoder padding counts as positions. With a cache
                it comes before a row's first real token only.
            position_ids: (B, N) say where documents begin that are packed into a row: where they do not go up by one between
                real tokens. Documents do not see each other, and segments restart. Otherwise positions are places in the row.
            past_key_values: a :class:`LongNetCache`; the inputs are then the next N tokens, and no graph is kept.
            inputs_embeds: (B, N, hidden_size) rows of the embedding table in place of ``input_ids``.
            use_cache: make a cache and return it as ``past_key_values``. None means no: only ``generate`` follows the config.
            output_hidden_states: also return the inputs of all blocks and the result, ``num_hidden_layers + 1`` in all.
            kwargs: ``cu_seq_lens_q`` (documents + 1,) says where documents begin, in place of ``position_ids``; B = 1.

        Raises:
            TypeError, ValueError: an input of the wrong type or shape; what cannot be honoured: a mask of scores (4-D),
                ``output_attentions``, a cache in training or of another model, inputs that LongNets have no use for
                (``head_mask``, ``global_attention_mask``, ``encoder_hidden_states``, a ``seq_idx`` alone).
        """
        if kwargs.get("output_attentions") or (
            kwargs.get("output_attentions") is None and self.config.output_attentions
        ):
            raise ValueError("output_attentions=True: attention weights are never made; expected False")
        refuse_misspelt(self, kwargs)
        refuse_unknown(kwargs, position_ids)
        refuse_exported_documents(type(self).forward, (), {"position_ids": position_ids, **kwargs})
        x = self._embedded(input_ids, inputs_embeds)
        batch, length = x.shape[:2]
        # transformers 5.24 calls it ``cache``.
        cache = self._cache(kwargs.get("cache") if past_key_values is None else past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        padding = padding_of(attention_mask, batch, length, past)
        documents = kwargs.get("cu_seq_lens_q")
        bounds = documents_of(padding, position_ids, documents, batch, length, has_past=cache is not None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        if cache is not None:
            hidden = cache.read(self.stack, x, padding, states)
        elif bounds is not None:
            # Documents of all rows, one after the other in one row.
            flat = None if padding is None else padding.reshape(1, -1)
            hidden = self.stack.run_blocks(x.reshape(1, batch * length, -1), flat, cu_seqlens=bounds, states=states)
            hidden = hidden.view(batch, length, -1)
            states = None if states is None else [state.view(batch, length, -1) for state in states]
        else:
            rows = rows_from_start(self.stack, self.stack.config.causal, padding)
            if rows is None or padding is None:
                hidden = self.stack.run_blocks(x, padding, states=states)
            else:
                hidden = rows.moved_back(self.stack.run_blocks(rows.moved(x), rows.moved(padding), states=states))
                states = None if states is None else [rows.moved_back(state) for state in states]
        named: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if states is None else (*states, hidden),
            **named,
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            number = "neither" if input_ids is None else "both"
            raise ValueError(f"{number} of input_ids and inputs_embeds given: expected exactly one")
        input_ids = as_int64(input_ids)
        if input_ids is not None:
            self.stack.check_tokens(input_ids, "input_ids")
            # Through the module: hooks of others (PEFT's among them) see the table's rows.
            inputs_embeds = self.stack.embedding(input_ids)
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}: expected (B, N, {self.config.hidden_size})"
            )
        return inputs_embeds * self.stack.embedding_scale

    def _cache(self, cache: LongNetCache | None, use_cache: bool | None) -> LongNetCache | None:
        if cache is None and not use_cache:
            return None
        if cache is not None and not isinstance(cache, LongNetCache):
            raise TypeError(
                f"past_key_values has type {type(cache).__name__}: expected a longnet.hf.LongNetCache. It holds only the rows "
                "that segments reach, so keys made elsewhere (PEFT's prefix tuning) cannot precede the text: use prompt tuning "
                "or LoRA"
            )
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "a cache (past_key_values, use_cache=True) in training: a cache holds no graph; expected use_cache=False, "
                "model.eval() or torch.no_grad()"
            )
        return LongNetCache() if cache is None else cache


class LongNetWithHead(LongNetPreTrainedModel):
    """A model and a head that read whole rows, without a cache."""

    model: LongNetModel
    _output_class: type[ModelOutput]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits, and the loss of ``labels``, both as the class says; other arguments as in :meth:`LongNetModel.forward`."""
        out = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        logits = self._logits(out.last_hidden_state, attention_mask, input_ids)
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return self._output_class(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def _logits(self, hidden: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError
