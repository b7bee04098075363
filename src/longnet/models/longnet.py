"""The two LongNets (arXiv 2307.02486, section 4): a decoder language model and an encoder, on one stack of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet.attention.sharding import mean_over
from longnet.models.base import LongNetBase
from longnet.models.cache import LongNetCache, make_cache
from longnet.models.config import LongNetConfig
from longnet.models.generation import LanguageModel
from longnet.models.loss import chunked_cross_entropy, positions_at_once
from longnet.models.padding import rows_from_start
from longnet.models.placement import dtype_of
from longnet.runtime.autocast import autocast_dtype


class LongNetLM(LanguageModel):
    """Decoder language model: token ids (B, N) int64 to logits (B, N, vocab_size).

    Args:
        config: shape and options, with ``causal=True``.
        device, dtype: of all parameters.

    Raises:
        ValueError: ``config.causal`` is False.
    """

    def __init__(
        self, config: LongNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        if not config.causal:
            raise ValueError(
                "config.causal=False: a language model that attends to the tokens it predicts learns nothing; "
                "expected config.replace(causal=True), or a LongNetEncoder"
            )
        self.head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.config.dim**-0.5)

    def forward(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, *, cache: LongNetCache | None = None
    ) -> Tensor:
        """Logits (B, N, vocab_size) of the token after each position, in the model's dtype.

        All logits at once: for long inputs use :meth:`loss`, or :meth:`hidden` and :meth:`logits` on parts of it.

        Args:
            tokens: (B, N) int64 ids.
            key_padding_mask: (B, N) bool, True where the token is padding and not to be attended to. Padding at a row's start is
                no part of the row: it gives what it gives alone, padded on the right or not at all. (Where ranks share rows,
                and in models of torchscale's definition, padding counts as positions.) With a cache padding comes before all
                other tokens of its row.
            cache: from :meth:`new_cache`. ``tokens`` are then the next N >= 1 of each row, after all that were read with this
                cache, and logits are those of one call over everything. Without gradients.

        Raises:
            TypeError: tokens that are not int64, a mask that is not bool, a cache of another type.
            ValueError: wrong shapes or devices; an id outside the vocabulary (seen on the CPU only); a cache for another
                model or batch, or one that an exception left half-read; no token to read into it.
        """
        return self._hidden(tokens, key_padding_mask, cache, self._logits)

    def hidden(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, *, cache: LongNetCache | None = None
    ) -> Tensor:
        """Normalised hidden states (B, N, dim) of the last block; arguments and errors as in :meth:`forward`."""
        return self._hidden(tokens, key_padding_mask, cache)

    # Methods that users call never call one another: sharded, each gathers the weights when it is entered.
    def _hidden(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None,
        cache: LongNetCache | None = None,
        finish: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """``finish`` of the hidden states; what it raises counts as a failed read of the cache."""
        self.check_tokens(tokens)
        self.check_mask(key_padding_mask, *tokens.shape)
        if cache is None:
            rows = rows_from_start(self, self.config.causal, key_padding_mask)
            if rows is None:
                return finish(self.run_blocks(self.embed(tokens), key_padding_mask, cu_seqlens=cu_seqlens))
            assert key_padding_mask is not None
            hidden = self.run_blocks(self.embed(rows.moved(tokens)), rows.moved(key_padding_mask))
            return finish(rows.moved_back(hidden))
        if not isinstance(cache, LongNetCache):
            raise TypeError(f"cache has type {type(cache).__name__}: expected a LongNetCache from model.new_cache")
        if len(cache.layers) != len(self.blocks):
            raise ValueError(
                f"cache has {len(cache.layers)} layers and the model {len(self.blocks)}: expected this model's"
            )
        if tokens.shape[1] == 0:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}: expected at least one token to read into the cache"
            )
        with torch.no_grad(), cache.reading():
            if key_padding_mask is not None:
                cache.place_rows(key_padding_mask)
            return finish(self.run_blocks(self.embed(tokens), key_padding_mask, cache))

    def new_cache(
        self, batch_size: int, *, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> LongNetCache:
        """An empty cache for reading ``batch_size`` rows bit by bit.

        Its size depends on the layers, never on the length, except in strided and full layers: these keep a share of all tokens.

        Args:
            max_length: how many tokens will be read at most, if that is known: the cache is smaller where segments are
                longer, and what grows with the length has room for ``max_length`` tokens. More raise an error. None: any number.
            dtype: of keys and values, default the model's, or autocast's where that is on.

        Raises:
            ValueError: a config that has no cached form, see :class:`LongNetCache`.
        """
        return make_cache(self, self.config, batch_size, max_length=max_length, dtype=dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head: hidden states (..., dim) to logits (..., vocab_size)."""
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden)
        table = self.embedding.weight
        if not isinstance(table, Tensor) or (table.is_meta and not hidden.is_meta):
            # Quantised or on disk: the module alone can say its rows.
            table = self.embedding(torch.arange(self.config.vocab_size, device=hidden.device))
        return F.linear(hidden.to(table.device), table)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Tensor:
        """Cross-entropy in nats (natural log), never holding the logits of more than ``config.loss_chunk`` positions.

        Computed in float32 (float64 for a float64 model); each chunk's logits are computed again in the backward pass.

        Args:
            tokens: (B, N) int64 ids.
            targets: (B, N) int64, the token that should follow each position: the caller shifts.
            key_padding_mask: (B, N) bool, True where the token is padding; the loss there is 0 and is not counted.
            reduction: ``"mean"`` over the counted positions (of all ranks of ``loss_group``), ``"sum"`` of them, or ``"none"``
                for (B, N) with 0 where not counted.
            ignore_index: the target of positions that do not count.
            cu_seqlens: where documents packed into one row, B = 1, begin, and where the last ends; see
                :func:`longnet.dilated_attention`. No token sees another document.

        Returns:
            float32 scalar or (B, N). The mean over no counted position at all is 0 with zero gradients, not NaN.

        Raises:
            TypeError, ValueError: as in :meth:`forward`, for the targets too; an unknown reduction.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown: expected 'mean', 'sum' or 'none'")
        self._check_targets(targets, tokens, ignore_index)
        hidden = self._hidden(tokens, key_padding_mask, cu_seqlens=cu_seqlens)
        if key_padding_mask is not None:
            targets = targets.masked_fill(key_padding_mask, ignore_index)
        chunk = positions_at_once(self.config.loss_chunk, self.config.vocab_size)
        losses = chunked_cross_entropy(self._logits, hidden.flatten(0, 1), targets.flatten(), chunk, ignore_index)
        if reduction == "none":
            return losses.view(targets.shape)
        if reduction == "sum":
            return losses.sum()
        count = (targets != ignore_index).sum()
        if self.loss_group is not None:
            return mean_over(self.loss_group, losses.sum(), count)
        return losses.sum() / count.clamp(min=1)

    def _check_targets(self, targets: Tensor, tokens: Tensor, ignore_index: int) -> None:
        self._check_integers(tokens, "tokens")
        self._check_integers(targets, "targets")
        if targets.shape != tokens.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: expected the tokens' {tuple(tokens.shape)}")
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_tokens(targets[targets != ignore_index][None], "targets")

    # Here, too, so that the documentation of this class shows it.
    generate = LanguageModel.generate


class LongNetEncoder(LongNetBase):
    """Bidirectional encoder: token ids (B, N) or embeddings (B, N, dim) to hidden states (B, N, dim).

    Args:
        config: shape and options, with ``causal=False``; ``tie_embeddings`` and ``loss_chunk`` play no part.
        device, dtype: of all parameters.

    Raises:
        ValueError: ``config.causal`` is True.
    """

    def __init__(
        self, config: LongNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        if config.causal:
            raise ValueError(
                "config.causal=True: an encoder attends to both sides; expected config.replace(causal=False), "
                "or a LongNetLM"
            )
        self.reset_parameters()

    def forward(
        self, tokens: Tensor | None = None, key_padding_mask: Tensor | None = None, *, embeddings: Tensor | None = None
    ) -> Tensor:
        """Normalised hidden states (B, N, dim); those of padded positions mean nothing.

        Args:
            tokens: (B, N) int64 ids.
            key_padding_mask: (B, N) bool, True where the token is padding: attention and norms leave it out.
            embeddings: (B, N, dim) float vectors in place of tokens, taken as they are (not scaled); padded ones may be
                anything, NaN too. Exactly one of ``tokens`` and ``embeddings`` is given. The embedding table then gets
                gradients of zero, as DistributedDataParallel needs them; ``requires_grad_(False)`` takes it out of training.

        Raises:
            TypeError: tokens that are not int64, embeddings not of the model's dtype (any float dtype under
                autocast), a mask that is not bool.
            ValueError: both or neither input; wrong shapes or devices; an id outside the vocabulary (seen on the CPU).
        """
        if (tokens is None) == (embeddings is None):
            inputs = "neither" if tokens is None else "both"
            raise ValueError(f"{inputs} of tokens and embeddings given: expected exactly one")
        if tokens is not None:
            self.check_tokens(tokens)
            self.check_mask(key_padding_mask, *tokens.shape)
            embeddings = self.embed(tokens)
        else:
            assert embeddings is not None
            self._check_embeddings(embeddings)
            self.check_mask(key_padding_mask, *embeddings.shape[:2])
            if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.embedding.parameters()):
                # DDP waits for a gradient of every parameter: a look-up of no token gives the table one of zeros.
                none = torch.empty(0, dtype=torch.int64, device=embeddings.device)
                embeddings = embeddings + self.embedding(none).sum()
        return self.run_blocks(embeddings, key_padding_mask)

    def _check_embeddings(self, embeddings: Tensor) -> None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            kind = getattr(embeddings, "dtype", type(embeddings).__name__)
            raise TypeError(f"embeddings has type {kind}: expected a float tensor (B, N, dim)")
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.config.dim:
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)}: expected (B, N, dim) with dim={self.config.dim}"
            )
        self._check_device(embeddings, "embeddings")
        dtype = dtype_of(self.embedding, self)
        if embeddings.dtype != dtype and autocast_dtype(embeddings.device.type) is None:
            raise TypeError(
                f"embeddings has dtype {embeddings.dtype} and the model {dtype}: expected the same, or autocast"
            )
