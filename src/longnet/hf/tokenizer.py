"""Bytes as tokens: nothing to learn, nothing to download, any text and any file."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

_BYTES = 256


class LongNetByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes are the ids 0 to 255, special tokens follow in the order of the arguments: 256, 257, ...

    It adds no special token by itself, as ``longnet train`` reads bytes alone. It pads on the left, as generation needs it.
    A special token may also be one of the bytes: ``pad_token="\\0"`` pads with the id 0, for a model that knows 256 ids.

    Args:
        pad_token, bos_token, eos_token, mask_token: their text, None for none.
        errors: how bytes that are no UTF-8 are shown: ``"replace"`` (U+FFFD), ``"ignore"``, ``"strict"``, or
            ``"surrogateescape"``, with which every sequence of bytes survives decoding and encoding.

    Raises:
        ValueError: ``errors`` is none of these.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        pad_token: Any = "<pad>",
        bos_token: Any = "<bos>",
        eos_token: Any = "<eos>",
        mask_token: Any = None,
        errors: str = "replace",
        **kwargs: Any,
    ) -> None:
        known = ("replace", "ignore", "strict", "surrogateescape")
        if errors not in known:
            raise ValueError(f"errors={errors!r}: expected one of {known}")
        # Where a folder says what code reads it: that was this.
        kwargs.pop("auto_map", None)
        self.errors = errors
        # transformers would number them in an order of its own.
        named = [str(token) for token in (pad_token, bos_token, eos_token, mask_token) if token is not None]
        after = [token for token in dict.fromkeys(named) if self._convert_token_to_id(token) is None]
        self._added_tokens_decoder = {
            _BYTES + place: AddedToken(token, special=True, normalized=False) for place, token in enumerate(after)
        }
        super().__init__(
            pad_token=pad_token,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            errors=errors,
            **{
                "padding_side": "left",
                "clean_up_tokenization_spaces": False,
                "special_tokens_pattern": "none",
                **kwargs,
            },
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Nothing: an installed library is not copied into folders, see :func:`longnet.hf.save_remote_code`."""

    @property
    def vocab_size(self) -> int:
        """256, without special tokens; ``len(tokenizer)`` counts these too."""
        return _BYTES

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(_BYTES)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        # A lone surrogate stands for a byte that was no UTF-8.
        return [chr(byte) for byte in text.encode("utf-8", "surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < _BYTES else None

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < _BYTES:
            raise ValueError(f"id {index}: expected 0 to {len(self) - 1}")
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; special ones are written out."""
        special = self.added_tokens_encoder
        parts = (token.encode() if token in special else bytes([ord(token)]) for token in tokens)
        return b"".join(parts).decode("utf-8", self.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No file: there is nothing to say."""
        return ()
