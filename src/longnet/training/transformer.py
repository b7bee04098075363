"""A decoder of Hugging Face under dilated attention, as the training loop, the report and generation need a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longnet.attention.sharding import mean_over
from longnet.checks import check_callable, check_int
from longnet.distributed import shard_weights
from longnet.models.generation import Sampling, evaluating
from longnet.models.loss import chunked_cross_entropy, positions_at_once
from longnet.runtime.torch_internals import flattened_mesh
from longnet.training.transformer_config import TransformerConfig

# Tokens of a prompt that are read at one time.
_CHUNK = 8192


class TransformerLM(nn.Module):
    """A causal language model of Hugging Face whose attention is that of a :class:`TransformerConfig`.

    Attributes:
        model: the ``PreTrainedModel`` under :func:`longnet.hf.apply`. Its parameters are all that this module has.
        config: what it was made from.
        blocks: its decoder layers.
        loss_group: the ranks over whose positions a mean loss is taken, None for this process alone.

    Args:
        config: of the model.
        device, dtype: of the parameters. Buffers, rotary frequencies say, stay float32.

    Raises:
        ValueError: a model that :func:`longnet.hf.apply` refuses, an encoder, decoder layers that are no list.
        ModuleNotFoundError: transformers is missing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from longnet.hf.causal import make_causal_lm
        from longnet.hf.dilation import apply
        from longnet.hf.layers import dilated_layers
        from longnet.hf.transformers_internals import attends_causally

        super().__init__()
        self.config, self.loss_group = config, None
        self.model: Any = make_causal_lm(copy.deepcopy(config.hugging_face), device, dtype or torch.float32)
        kind = type(self.model).__name__
        apply(self.model, **config.apply_options())
        attending = dilated_layers(self.model)
        if not all(attends_causally(layer) for layer in attending):
            raise ValueError(f"{kind} attends to later tokens, it is an encoder: expected a decoder")
        self.blocks = _decoder_layers(self.model, attending)
        if config.gradient_checkpointing:
            # transformers 5.17 has the other name alone, and a newer one warns of it.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
            enable({"use_reentrant": False})
        self._has_plain_head = self.model.device.type != "meta" and self._is_plain_head()

    # A property, as a second place of these modules would give their weights a second name.
    @property
    def blocks(self) -> nn.ModuleList:
        return self._blocks[0]

    @blocks.setter
    def blocks(self, blocks: nn.ModuleList) -> None:
        self._blocks = (blocks,)

    @property
    def embedding(self) -> nn.Module:
        """The table of tokens."""
        return self.model.get_input_embeddings()

    def attend_as(self, config: TransformerConfig) -> None:
        """Let the layers attend as another config of the same transformer says, in place; the weights stay.

        Raises:
            ValueError: a config that :func:`longnet.hf.apply` refuses. The model is then as it was.
        """
        from longnet.hf.dilation import apply, restore

        restore(self.model)
        try:
            apply(self.model, **config.apply_options())
        except (TypeError, ValueError):
            apply(self.model, **self.config.apply_options())
            raise
        self.config = config

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (B, N, rows of the embedding) of tokens (B, N) int64 at ``positions`` (1, N) int64, default 0, 1, ..."""
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        reduction: str = "mean",
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """Cross-entropy in nats; targets of -100 do not count.

        Logits of at most ``config.loss_chunk`` positions exist at one time, and are computed again in the backward pass. Models
        that change the logits after their last linear layer (soft caps, scales) hold those of all positions.

        Args:
            tokens, targets: (B, N) int64; the caller shifts.
            reduction: ``"mean"`` over the counted positions of all ranks, or ``"none"`` for (B, N).
            cu_seqlens: where documents packed into one row, B = 1, begin, and where the last ends. Positions restart there.

        Returns:
            float32 scalar or (B, N).

        Raises:
            ValueError: an unknown reduction.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown: expected 'mean' or 'none'")
        positions = None if cu_seqlens is None else _positions(cu_seqlens, tokens.device)
        hidden, head = self._before_head(tokens, position_ids=positions, use_cache=False)
        chunk = positions_at_once(self.config.loss_chunk, self.config.vocab_size)
        losses = chunked_cross_entropy(head, hidden.flatten(0, 1), targets.flatten(), chunk)
        if reduction == "none":
            return losses.view(targets.shape)
        count = (targets != -100).sum()
        if self.loss_group is not None:
            return mean_over(self.loss_group, losses.sum(), count)
        return losses.sum() / count.clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos: int | None = None,
        on_token: Callable[[int], None] | None = None,
        streamer: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue a prompt (1, T) int64 by up to ``max_new_tokens`` tokens of the tokenizer: (1, T + n) int64.

        Arguments and errors are those of :meth:`longnet.LongNetLM.generate`, for one prompt.
        """
        from longnet.hf.causal import new_cache
        from longnet.hf.transformers_internals import CACHE

        if tokens.shape[0] != 1 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected one prompt of at least one token")
        check_callable("on_token", on_token)
        check_callable("streamer", streamer)
        self.check_length(tokens.shape[1], max_new_tokens)
        sampling = Sampling(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(seed)
        cache = new_cache(self.model)
        with evaluating(self):
            unread = tokens
            for step in range(max_new_tokens):
                for piece in unread.split(_CHUNK, 1):
                    hidden, head = self._before_head(piece, use_cache=True, **{CACHE: cache})
                # Rows of the embedding beyond the tokenizer's tokens stand for nothing.
                new = sampling.draw(head(hidden[:, -1])[:, : self.config.vocab_size], generator)
                unread = new[:, None]
                tokens = torch.cat((tokens, unread), 1)
                if streamer is not None:
                    streamer(new)
                if on_token is not None:
                    on_token(step + 1)
                if eos is not None and int(new) == eos:
                    break
        return tokens

    def check_length(self, prompt: int, max_new_tokens: int, name: str = "max_new_tokens") -> None:
        """Raise ValueError where positions end before a prompt of this length and the new tokens do.

        ``name`` is what the caller calls the number of new tokens.
        """
        from longnet.hf.causal import at_context

        check_int(name, max_new_tokens, 0)
        try:
            at_context(self.config.transformer, prompt + max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{name}={max_new_tokens} after a prompt of {prompt} tokens: {error}") from None

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the parameters over all ranks of a mesh by FSDP2, of a large model each decoder layer for itself, in place."""
        flat = flattened_mesh(mesh, "dp_cp")
        self.loss_group = flat.get_group()
        shard_weights(self, self.blocks, flat)
        dist.fsdp.register_fsdp_forward_method(self, "loss")

    def _before_head(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Hidden states (B, N, dim), and what makes logits of them; logits and the identity where no linear layer does."""
        if not self._has_plain_head:
            return self.model(input_ids=tokens, **options).logits, nn.Identity()
        return self.model.base_model(input_ids=tokens, **options).last_hidden_state, self.model.get_output_embeddings()

    def _is_plain_head(self) -> bool:
        """Whether a linear layer makes the logits, as two tokens show; some models scale or cap them after it."""
        head, tokens = self.model.get_output_embeddings(), torch.arange(2, device=self.model.device)[None]
        if head is None:
            return False
        with torch.no_grad(), evaluating(self):
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return torch.equal(head(hidden), self.logits(tokens))


def _decoder_layers(model: nn.Module, attending: Sequence[nn.Module]) -> nn.ModuleList:
    """The list of modules of which each has one attention layer.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != len(attending):
            continue
        if all(layer in set(block.modules()) for block, layer in zip(module, attending, strict=True)):
            return module
    raise ValueError(
        f"{type(model).__name__} has {len(attending)} attention layers and no list of as many decoder layers: expected a model "
        "with such a list"
    )


def _positions(cu_seqlens: Sequence[int], device: Any) -> Tensor:
    """Positions (1, N) int64 within documents that begin at these tokens."""
    bounds = torch.tensor(cu_seqlens)
    begins = bounds[:-1].repeat_interleave(bounds.diff())
    return (torch.arange(int(bounds[-1])) - begins)[None].to(device)
