"""What the decoder and the encoder share: the embedding, the stack of blocks, the final norm and the input checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet.attention.definition import LONGNET, warn_uncovered_by_stack
from longnet.models.cache import LongNetCache
from longnet.models.config import LongNetConfig
from longnet.models.layers import Block
from longnet.models.placement import device_of, is_dispatched
from longnet.nn.norm import BatchNorm, make_norm

# Fields that may change with the layer types, and what of a layer's attention follows from its type: no parameters.
_WITH_LAYER_TYPES = (
    *("sliding_window", "stride", "stride_block", "shift_keys", "far_positions", "segment_lengths", "dilation_rates"),
)
_OF_LAYER_TYPE = ("pattern", "xpos", "segment_offset", "shift_keys")


class LongNetBase(nn.Module):
    """Token embedding, ``config.layers`` blocks and the final norm; use LongNetLM or LongNetEncoder.

    Attributes:
        config: the LongNetConfig it was built from.
        gradient_checkpointing: whether blocks are recomputed in the backward pass; starts as the config says and may
            be set at any time.
        loss_group: the ranks over whose positions a mean loss is taken, None for this process alone; see
            ``longnet.distributed.parallelize``.
    """

    def __init__(
        self, config: LongNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, LongNetConfig):
            raise TypeError(f"config={config!r} has type {type(config).__name__}: expected a LongNetConfig")
        warn_uncovered_by_stack(config.layer_attentions())
        self.config = config
        self.gradient_checkpointing = config.gradient_checkpointing
        self.loss_group: Any = None
        # longnet.compat sets it for checkpoints whose tables are used as they are.
        self.embedding_scale = config.dim**0.5
        self.embedding = nn.Embedding(config.vocab_size, config.dim, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(config, layer, device=device, dtype=dtype) for layer in range(config.layers))
        self.norm = make_norm(config.norm, config.dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw fresh parameters: MAGNETO's for the blocks, normal with deviation ``dim ** -0.5`` for the tokens."""
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.reset_parameters(self.config.layers)  # type: ignore[operator]
        self.norm.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def with_layer_types(self, layer_types: Sequence[str], **changes: Any) -> Self:
        """A copy whose layers compute something else with this model's weights: all types have the same parameters.

        The copy owns its weights: training one model changes nothing in the other. A model that was trained as another stack
        needs more training before it is good as this one.

        Args:
            layer_types: of :class:`LongNetConfig`, for every layer or repeated.
            changes: ``sliding_window``, ``stride``, ``stride_block``, ``shift_keys``, ``far_positions``, ``segment_lengths``
                and ``dilation_rates`` in place of the config's.

        Raises:
            TypeError, ValueError: as the config, for a change of another field too. ValueError: a model that is parallelized or
                computes what torchscale does.
        """
        if unknown := [name for name in changes if name not in _WITH_LAYER_TYPES]:
            raise ValueError(f"{', '.join(unknown)} cannot change with layer_types: expected {_WITH_LAYER_TYPES}")
        config = self.config.replace(layer_types=layer_types, **changes)
        if self.loss_group is not None:
            raise ValueError("model is parallelized: expected with_layer_types before parallelize")
        for layer, block in enumerate(self.blocks):
            if (computed := block.attention.definition) is not LONGNET:  # type: ignore[union-attr]
                raise ValueError(f"layer {layer} computes {computed.name}: expected LongNet's attention")  # type: ignore[union-attr]
        warn_uncovered_by_stack(config.layer_attentions())
        copied = copy.deepcopy(self)
        copied.config = config
        for layer, block in enumerate(copied.blocks):
            made = Block(config, layer, device="meta").attention
            for name in _OF_LAYER_TYPE:
                setattr(block.attention, name, getattr(made, name))
        return copied

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, N) int64 -> (B, N, dim), of unit variance at initialisation.

        The table's rows have norm 1, as a table that also serves as the output head needs: against a normalised hidden
        state they give logits of standard deviation 1, a first loss about half a nat above ``ln(vocab_size)``. The
        residual stream on the other hand wants the variance of the branches added to it, so the rows are scaled by
        ``sqrt(dim)`` on the way in (as in Attention Is All You Need, section 3.4).
        """
        # A quantised table reads contiguous ids alone.
        return self.embedding(tokens.contiguous()) * self.embedding_scale

    def run_blocks(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        cache: LongNetCache | None = None,
        *,
        cu_seqlens: Sequence[int] | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """All blocks and the final norm, (B, N, dim) -> (B, N, dim).

        Args:
            cu_seqlens: the documents packed into one row, B = 1, see :func:`longnet.dilated_attention`.
            states: gets the input of every block.
        """
        if key_padding_mask is not None:
            # Rows of padding become zeros, once: a NaN in one of them would reach every weight's gradient as 0 * NaN.
            x = x.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        recomputed = cache is None and self.gradient_checkpointing and torch.is_grad_enabled()
        layers = [None] * len(self.blocks) if cache is None else cache
        for block, layer in zip(self.blocks, layers, strict=True):
            if states is not None:
                states.append(x)
            if recomputed:
                x = self._checkpointed(block, x, key_padding_mask, cu_seqlens)
            else:
                x = block(x, key_padding_mask, layer, cu_seqlens)
        return self.norm(x, key_padding_mask)

    def _checkpointed(
        self, block: nn.Module, x: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Sequence[int] | None
    ) -> Tensor:
        inputs = (x, key_padding_mask, None, cu_seqlens)
        # Compiled graphs recompute values, never the writes to running statistics; and they take no such contexts.
        if self.config.norm != "batch" or torch.compiler.is_compiling():
            return checkpoint(block, *inputs, use_reentrant=False)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_statistics(block)

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    def check_tokens(self, tokens: Tensor, name: str = "tokens") -> None:
        """Refuse what is not a (B, N) int64 tensor of ids in the vocabulary on the model's device.

        The range is looked at on the CPU only, outside of compilation: elsewhere it would make the host wait for the
        device, whose own assertion in the embedding reports it.
        """
        self._check_integers(tokens, name)
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"{name} holds the ids {low} to {high}: expected 0 to {self.config.vocab_size - 1} "
                    f"(vocab_size={self.config.vocab_size})"
                )

    def _check_integers(self, tokens: Tensor, name: str) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} has type {type(tokens).__name__}: expected a (B, N) int64 tensor")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {tokens.dtype}: expected torch.int64, e.g. {name}.long()")
        if tokens.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}: expected (B, N), e.g. {name}[None] for one row")
        self._check_device(tokens, name)

    def _check_device(self, tensor: Tensor, name: str) -> None:
        device = device_of(self.embedding)
        if tensor.device != device and not is_dispatched(self.embedding):
            raise ValueError(f"{name} is on {tensor.device} and the model on {device}: expected one device")

    def check_mask(self, key_padding_mask: Tensor | None, batch: int, length: int) -> None:
        """Refuse a padding mask that is not a (B, N) bool tensor on the model's device."""
        if key_padding_mask is None:
            return
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            kind = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
            raise TypeError(f"key_padding_mask has type {kind}: expected a bool tensor, True where a token is padding")
        if tuple(key_padding_mask.shape) != (batch, length):
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}: expected (B, N) = {(batch, length)}"
            )
        self._check_device(key_padding_mask, "key_padding_mask")


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Recompute a block without moving its running statistics a second time."""
    norms = [(module, module.update_statistics) for module in block.modules() if isinstance(module, BatchNorm)]
    for norm, _ in norms:
        norm.update_statistics = False
    try:
        yield
    finally:
        for norm, previous in norms:
            norm.update_statistics = previous
