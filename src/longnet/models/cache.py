"""What a language model remembers of the tokens it has read: one bounded cache a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.streaming import DilatedCache
from longnet.checks import check_int
from longnet.geometry.reach import LayerAttention
from longnet.models.config import LongNetConfig
from longnet.models.placement import device_of, dtype_of
from longnet.runtime.autocast import autocast_dtype


def make_cache(
    model: nn.Module,
    config: LongNetConfig,
    batch_size: int,
    *,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> LongNetCache:
    """An empty cache for a stack of ``config``, each layer's where that block computes; see ``LongNetLM.new_cache``."""
    devices = [device_of(getattr(block, "attention", block)) for block in model.blocks]  # type: ignore[union-attr]
    if dtype is None:
        own, kind = dtype_of(model.embedding, model), devices[0].type  # type: ignore[arg-type]
        dtype = own if own == torch.float64 else autocast_dtype(kind) or own
    return LongNetCache(config, batch_size, dtype=dtype, device=devices, max_length=max_length)


def uncached_reason(config: LongNetConfig) -> str | None:
    """What keeps a model of this config from being read bit by bit, None if nothing does."""
    if config.use_rel_pos_bias:
        return "use_rel_pos_bias=True: cached attention takes no relative position bias yet; expected xPos or neither"
    return None


def _layer_cache(layer: LayerAttention, max_length: int | None, **options: Any) -> DilatedCache:
    pattern = layer.pattern if max_length is None else layer.pattern.shortened(max_length, layer.segment_offset)
    cache = DilatedCache(
        pattern.given_lengths,
        pattern.dilation_rates,
        **pattern.options,
        segment_offset=layer.segment_offset,
        shift_keys=layer.shift_keys,
        capacity=max_length,
        check_coverage=False,
        **options,
    )
    cache._whole_pattern = replace(cache.pattern, branches=layer.pattern.branches, window=layer.pattern.window)
    return cache


class LongNetCache:
    """The keys and values that later tokens can still reach, layer by layer.

    A branch with segment w and rate r reaches at most w / r keys per head, whatever came before, so its size is fixed when
    it is made: reading goes on forever in constant memory. Strided and full layers keep a share of all tokens instead.
    ``model.new_cache(batch_size)`` makes one.

    A call that raises after some layer has read its tokens leaves a cache that refuses to go on, until it is reset or loads a
    state; a clone made before is not touched.

    Args:
        config: of the model.
        batch_size: rows that are read side by side.
        dtype: of keys and values, the model's.
        device: the model's, or one for each layer.
        max_length: how many tokens will be read at most, None for any number; see ``LongNetLM.new_cache``.

    Raises:
        ValueError: a bidirectional config, or one with a relative position bias, which has no cached form yet.
    """

    def __init__(
        self,
        config: LongNetConfig,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        max_length: int | None = None,
    ) -> None:
        if not config.causal:
            raise ValueError(
                "config.causal=False: a bidirectional model reads later tokens first; expected a causal one"
            )
        if (reason := uncached_reason(config)) is not None:
            raise ValueError(f"config.{reason}")
        devices = [device] * config.layers if device is None or isinstance(device, (torch.device, str)) else device
        if len(devices) != config.layers:
            raise ValueError(
                f"device={device} has {len(devices)} entries: expected one for each of {config.layers} layers"
            )
        if max_length is not None:
            check_int("max_length", max_length, 1)
        layers = config.layer_attentions()
        self._grids = tuple(layer.segment_offset for layer in layers)
        self.layers = tuple(
            _layer_cache(
                layer,
                max_length,
                batch_size=batch_size,
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                head_numbers=config.layer_head_numbers(number),
                backend=config.backend,
                dtype=dtype,
                device=devices[number],
            )
            for number, layer in enumerate(layers)
        )
        self._torn = False  # an exception came while layers were moving

    def __iter__(self) -> Iterator[DilatedCache]:
        return iter(self.layers)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self.layers[0].position

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together; the same before and after any number of tokens where all are :attr:`bounded`."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Of these, the bytes that later tokens can reach by now."""
        return sum(layer.nbytes_used for layer in self.layers)

    @property
    def bounded(self) -> bool:
        """Whether the size of every layer is fixed."""
        return all(layer.bounded for layer in self.layers)

    def place_rows(self, key_padding_mask: Tensor) -> None:
        """Let the grid of each row that has had no real token yet begin at its first one, as this mask of the next tokens tells.

        Args:
            key_padding_mask: (B, T) bool of the next T tokens, True where one is padding.
        """
        leading = self.layers[0]._leading(key_padding_mask)
        if leading is None:
            return
        for layer, grid in zip(self.layers, self._grids, strict=True):
            offsets = grid - leading.to(layer.device)
            if layer.offsets is None or not torch.equal(layer.offsets, offsets):
                layer.set_segment_offset(offsets)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which all layers read the same tokens; to run a model's blocks on a cache by hand, enter it.

        After an exception all layers are at their old position, or the cache refuses to go on.

        Raises:
            ValueError: an exception has left the layers at different positions, or half-written.
        """
        self._check_whole()
        position = self.position
        self._torn = True
        try:
            yield
        except BaseException:
            self._torn = any(layer._torn or layer.position != position for layer in self.layers)
            raise
        self._torn = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which all layers change alike; after an exception the cache refuses to be read."""
        before, self._torn = self._torn, True
        yield
        self._torn = before

    def _check_whole(self) -> None:
        positions = sorted({layer.position for layer in self.layers})
        if self._torn or len(positions) > 1 or any(layer._torn for layer in self.layers):
            raise ValueError(
                f"cache stands at positions {positions} since an exception came while its layers were read or changed: expected "
                "one after reset() or load_state_dict(), or a clone made before"
            )

    def moved(self, tokens: int, *, on_device: bool = True) -> None:
        """Count tokens that a CUDA graph has read, see :meth:`longnet.DilatedCache.moved`.

        After a replay of a captured step call ``moved(1, on_device=False)``. After the capture, which runs nothing, pass -1.
        """
        for layer in self.layers:
            layer.moved(tokens, on_device=on_device)

    def reset(self) -> None:
        """Forget everything: the next token is the first."""
        self._torn = True
        for layer in self.layers:
            layer.reset()
        self._torn = False

    def clone(self) -> LongNetCache:
        """A copy that goes its own way: read a long prefix once, continue it many ways."""
        copy = LongNetCache.__new__(LongNetCache)
        copy.layers, copy._torn = tuple(layer.clone() for layer in self.layers), self._torn
        copy._grids = self._grids
        return copy

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row ``index[b]`` has read, (B,) int64: for beams."""
        self.layers[0]._check_order(index)
        with self.writing():
            for layer in self.layers:
                layer.reorder(index)

    def state_dict(self) -> dict[str, Tensor]:
        """Every layer's tensors, by ``layers.N.``; ``safetensors.torch.save_file`` takes them as they are.

        Raises:
            ValueError: an exception left the layers at different positions, or half-written.
        """
        self._check_whole()
        return {
            f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state. On any error nothing has changed.

        Raises:
            ValueError: layers that are missing or too many, or a layer of another pattern, batch, size or type.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for name, x in state.items():
            layers, _, rest = name.partition(".")
            number, _, key = rest.partition(".")
            if layers != "layers" or not number.isdecimal() or int(number) >= len(parts) or not key:
                raise ValueError(f"state holds {name!r}: expected layers.N. with N below {len(parts)}")
            parts[int(number)][key] = x
        loaded = [layer.clone() for layer in self.layers]
        for place, (layer, part) in enumerate(zip(loaded, parts, strict=True)):
            try:
                layer.load_state_dict(part)
            except ValueError as error:
                raise ValueError(f"layer {place}: {error}") from None
        if len({layer.position for layer in loaded}) > 1:
            raise ValueError(f"layers stand at positions {[layer.position for layer in loaded]}: expected one position")
        self.layers, self._torn = tuple(loaded), False
