"""LongNets with a head over the vocabulary: the next token, or masked ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from longnet.compress import quantization
from longnet.hf.cache import LongNetCache, capture_in_generate, generating
from longnet.hf.configuration import LongNetConfig
from longnet.hf.inputs import as_int64
from longnet.hf.modeling import LongNetModel, LongNetPreTrainedModel, LongNetWithHead
from longnet.hf.transformers_internals import CACHE, can_return_tuple, overrides
from longnet.models import LongNetLM


class _WithVocabulary(LongNetPreTrainedModel):
    """A model and a linear head over the vocabulary, by default the embedding table."""

    _tied_weights_keys = {"lm_head.weight": "model.stack.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=logits, labels=as_int64(labels), vocab_size=self.config.vocab_size, **kwargs
        )
        return loss


class LongNetForCausalLM(_WithVocabulary, GenerationMixin):
    """A LongNet that predicts the next token, :class:`longnet.LongNetLM` for Hugging Face.

    Raises:
        ValueError: ``config.is_causal`` is False.
    """

    def __init__(self, config: LongNetConfig) -> None:
        if not config.is_causal:
            raise ValueError("config.is_causal=False: expected a decoder, or LongNetForMaskedLM")
        super().__init__(config)
        # transformers takes it from the class's name, which a subclass changes.
        self.loss_type = "ForCausalLM"

    def _get_name(self) -> str:
        # Trainer shifts smoothed labels for this name alone; subclasses, FSDP2's among them, have another.
        return LongNetForCausalLM.__name__

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, N, vocab_size); arguments as in :meth:`LongNetModel.forward`.

        Args:
            labels: (B, N) int64 or int32, the tokens themselves (shifted here), -100 where none is to be predicted.
            logits_to_keep: of the last so many positions only, or of those in a tensor; 0 for all.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            return_dict=True,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, positions])
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: out.get(CACHE)}
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens after a prompt: arguments, result and errors are those of ``transformers.GenerationMixin.generate``.

        With ``cache_implementation="static"``, on a GPU, steps of one token are replayed from a CUDA graph.
        """
        with generating():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @overrides(GenerationMixin)
    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """What ``generate`` calls for its cache: a bounded one instead of transformers' own."""
        kind = generation_config.cache_implementation
        if model_kwargs.get(CACHE) is not None:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if not generation_config.use_cache:
            return
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a LongNet's cache is bounded and stays on its device; expected None or "
                "'dynamic' for a longnet.hf.LongNetCache, 'static' for one of this length alone"
            )
        if self.config.use_rel_pos_bias:
            # As LongNetLM.generate does: there is no cached form yet.
            generation_config.use_cache = False
            return
        cache = LongNetCache(max_cache_length if kind == "static" else None)
        if kind == "static":
            capture_in_generate(cache)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE] = cache

    def to_longnet(self) -> LongNetLM:
        """The plain model with the same parameters, shared and not copied: what changes in one changes in the other."""
        stack = self.model.stack
        with torch.device("meta"):
            plain = LongNetLM(stack.config)
        plain.embedding, plain.blocks, plain.norm = stack.embedding, stack.blocks, stack.norm
        if plain.head is not None:
            plain.head = self.lm_head
        return plain.train(self.training)

    @classmethod
    def from_longnet(cls, model: LongNetLM, **more: Any) -> LongNetForCausalLM:
        """A model of this class with the same parameters as a plain one, shared and not copied.

        Args:
            more: fields of the config that the plain one has not: token ids, say. Without, a vocabulary of bytes has none.

        Raises:
            TypeError: no LongNetLM. ValueError: quantised weights (quantise this class's model with transformers), or a model
                that computes what torchscale does.
        """
        if not isinstance(model, LongNetLM):
            raise TypeError(f"model has type {type(model).__name__}: expected a longnet.LongNetLM")
        if quantization(model) is not None:
            raise ValueError(f"model is quantised ({quantization(model)}): expected plain weights")
        if model.embedding_scale != model.config.dim**0.5:
            raise ValueError("model computes what torchscale does: expected one of the plain definition")
        with torch.device("meta"):
            adapted = cls(LongNetConfig.from_longnet(model.config, **more))
        stack = adapted.model.stack
        stack.embedding, stack.blocks, stack.norm = model.embedding, model.blocks, model.norm
        adapted.lm_head.weight = model.embedding.weight if model.head is None else model.head.weight
        return adapted.train(model.training)

    @classmethod
    def from_run(cls, folder: str | Path, **more: Any) -> LongNetForCausalLM:
        """The trained model of a ``longnet train`` folder, in evaluation mode; ``more`` and errors as in :meth:`from_longnet`.

        Needs what training needs, the extra ``train``. ``AutoTokenizer.from_pretrained(folder)`` reads the run's tokenizer, if
        it has one; ``eos_token_id`` is the token that ends a document, unless ``more`` says otherwise.

        Raises:
            ValueError: no run there, no model in it yet, or a damaged one.
        """
        from longnet.training.folder import RunFolder, load_model

        end = RunFolder(folder).tokenizer.end
        return cls.from_longnet(load_model(folder), **({} if end is None else {"eos_token_id": end}) | more)

    def to_run(self, folder: str | Path) -> None:
        """Write a folder that ``longnet generate``, ``longnet stream`` and :meth:`from_run` read; errors if one is there."""
        from longnet.training.folder import save_model

        save_model(self.to_longnet(), folder)


# For tools that ask for its arguments.
LongNetForCausalLM.generate.__signature__ = inspect.signature(GenerationMixin.generate)  # type: ignore[attr-defined]


class LongNetForMaskedLM(_WithVocabulary, LongNetWithHead):
    """A bidirectional LongNet that predicts masked tokens.

    It takes ``input_ids``, ``attention_mask``, ``position_ids`` and ``inputs_embeds`` as :class:`LongNetModel` does, and
    ``labels`` (B, N), int64 or int32, -100 where no token was masked. Logits are (B, N, vocab_size).

    Raises:
        ValueError: ``config.is_causal`` is True.
    """

    _output_class = MaskedLMOutput

    def __init__(self, config: LongNetConfig) -> None:
        if config.is_causal:
            raise ValueError("config.is_causal=True: expected an encoder, is_causal=False, or LongNetForCausalLM")
        super().__init__(config)
        self.loss_type = "ForMaskedLM"

    def _logits(self, hidden: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits
