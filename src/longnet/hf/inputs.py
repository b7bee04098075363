"""What a model of Hugging Face is told about padding and packed documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.packed import boundaries
from longnet.hf.masks import documents, packed_bounds

# Where padding is and documents begin.
_KEYWORDS = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_UNKNOWN = ("global_attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask")


def as_int64(ids: Any) -> Any:
    """int32 token ids or labels as int64, which losses and ``check_tokens`` ask for; everything else as it is."""
    return ids.long() if isinstance(ids, Tensor) and ids.dtype == torch.int32 else ids


def padding_of(attention_mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """Which of the next N tokens are padding, (B, N) bool; None for none.

    Raises:
        TypeError: a mask that is no tensor. ValueError: one of another shape, or one that says more than padding.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask has type {type(attention_mask).__name__}: expected a (B, S) tensor")
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] != past + length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected (B, S) = {(batch, past + length)}, 0 where a "
            "token is padding; masks of scores (4-D) cannot be honoured"
        )
    mask = attention_mask[:, past:]
    traced = torch.compiler.is_compiling()
    if mask.is_floating_point() and not traced and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds floats other than 0 and 1: expected 1 for a token and 0 for padding")
    padded = mask == 0
    # Without a mask kernels have less to do; a graph cannot look.
    return padded if traced or bool(padded.any()) else None


def refuse_misspelt(model: nn.Module, options: dict[str, Any]) -> None:
    """Raise ValueError for a keyword close to one that attention reads; models of transformers ignore those they do not know."""
    if not torch.compiler.is_compiling():
        for name, value in options.items():
            if value is not None and (meant := _meant(type(model).forward, name)):
                raise ValueError(f"{name} is no keyword of {type(model).__name__}: expected {meant}")


def refuse_exported_documents(forward: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise ValueError for tensors that say where documents begin, given to ``forward`` while torch exports it."""
    if torch.compiler.is_exporting():
        given = {**dict(zip(inspect.signature(forward).parameters, arguments, strict=False)), **options}
        for name in _KEYWORDS[1:]:
            if isinstance(given.get(name), Tensor):
                raise ValueError(
                    f"{name} in an exported graph: where documents begin decides which operations there are; expected one "
                    "document a row, without it"
                )


@lru_cache(maxsize=1024)
def _meant(forward: Callable[..., Any], name: str) -> str | None:
    if name in _KEYWORDS or name in inspect.signature(forward).parameters:
        return None
    # Other inputs are masks and positions too, of images say: such a name must be all but the same.
    return next(iter(get_close_matches(name, _KEYWORDS, 1, cutoff=0.8 if name.startswith("cu_") else 0.85)), None)


def refuse_unknown(options: dict[str, Any], position_ids: Tensor | None) -> None:
    """Raise for inputs of other models that would change what a LongNet computes, if it had a use for them."""
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise ValueError(f"{name} given: a LongNet has no use for it; expected None")
    # Collators give it beside what is read here.
    if options.get("seq_idx") is not None and options.get("cu_seq_lens_q") is None and position_ids is None:
        raise ValueError("seq_idx given: expected position_ids or cu_seq_lens_q, which say where documents begin too")


def documents_of(
    padding: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Any,
    batch: int,
    length: int,
    *,
    has_past: bool,
) -> tuple[int, ...] | None:
    """Where the documents begin that ``cu_seq_lens`` or ``position_ids`` (B or 1, N) separate, of all rows one after the other;
    None for no more than one a row.

    Raises:
        TypeError, ValueError: boundaries that are none of this row, of several rows, or beside a cache.
    """
    if cu_seq_lens is not None:
        if batch != 1 or has_past:
            raise ValueError(
                f"cu_seq_lens_q with B = {batch}{' and a cache' if has_past else ''}: expected documents packed into one row, "
                "B = 1, and no cache"
            )
        return boundaries(cu_seq_lens, length)
    if position_ids is None:
        return None
    mask = documents(None if padding is None else (~padding).long(), position_ids, length, has_past=has_past)
    return None if mask is None else packed_bounds(mask)
