"""``gigapath.slide_encoder`` for programs that were written for the original, computed by this library."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from longnet.gigapath.architectures import ARCHITECTURES, TILE_CHANNELS
from longnet.gigapath.checkpoint import channels_of, named, read_checkpoint
from longnet.gigapath.encoder import SlideEncoder

_HUB = "hf_hub:"
_FILE = "slide_encoder.pth"


class LongNetViT(SlideEncoder):
    """:class:`SlideEncoder` by the original's name and arguments; state dicts have the original's keys.

    Args:
        in_chans: channels of a tile embedding.
        embed_dim, depth: of a published size, see ``ARCHITECTURES``.
        max_wsi_size: in pixels. The default is the original's: with ``tile_size`` it decides the segment lengths.
        norm_layer: makes a ``LayerNorm``, whose ``eps`` the last norm takes.
        mlp_ratio: 4.
        Others as of :class:`SlideEncoder`, whose ``drop_path`` is ``drop_path_rate`` here.

    Raises:
        TypeError, ValueError: a bad value, named; a size that was not published.
    """

    def __init__(
        self,
        in_chans: int = TILE_CHANNELS,
        embed_dim: int = 768,
        depth: int = 12,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        max_wsi_size: int = 262_144,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        mlp_ratio: float = 4.0,
    ) -> None:
        if (depth, embed_dim) not in ARCHITECTURES.values() or mlp_ratio != 4.0:
            raise ValueError(
                f"depth={depth}, embed_dim={embed_dim}, mlp_ratio={mlp_ratio}: expected mlp_ratio=4 and (depth, embed_dim) of "
                f"{tuple(ARCHITECTURES.values())}"
            )
        super().__init__(
            embed_dim,
            depth,
            in_dim=in_chans,
            max_wsi_size=max_wsi_size,
            tile_size=tile_size,
            slide_ngrids=slide_ngrids,
            global_pool=global_pool,
            dropout=dropout,
            drop_path=drop_path_rate,
        )
        norm = norm_layer(1)
        if not (isinstance(norm, nn.LayerNorm) and isinstance(self.norm, nn.LayerNorm)):
            raise TypeError(f"norm_layer makes a {type(norm).__name__}: expected a LayerNorm")
        self.norm.eps = norm.eps
        self.register_state_dict_post_hook(_to_upstream_keys)
        self.register_load_state_dict_pre_hook(_from_upstream_keys)

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        padding_mask: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """As :meth:`SlideEncoder.forward`; the coordinates of a batch of one may be (L, 2), as the original takes them."""
        if isinstance(coords, Tensor) and coords.dim() == 2:
            coords = coords[None]
        return super().forward(x, coords, all_layer_embed, padding_mask, layers=layers)


def create_model(
    pretrained: str | os.PathLike[str],
    model_arch: str,
    in_chans: int,
    local_dir: str | None = None,
    *,
    slide_ngrids: int = 1000,
    tile_size: int = 256,
    max_wsi_size: int = 262_144,
    global_pool: bool = False,
    dropout: float = 0.25,
    drop_path_rate: float = 0.1,
) -> LongNetViT:
    """An encoder with a checkpoint's weights, in evaluation mode.

    Args:
        pretrained: a file, ``"hf_hub:owner/name"`` whose ``slide_encoder.pth`` is downloaded, or ``""`` for random weights.
        model_arch: one of ``ARCHITECTURES``.
        local_dir: the hub's cache, None: its default. Repositories have a folder each.
        Others as of :class:`LongNetViT`.

    Raises:
        FileNotFoundError: no such file; the original goes on with random weights. OSError: a download that failed.
        ModuleNotFoundError: a hub name without ``huggingface_hub``.
        ValueError: an unknown architecture, weights that do not fit, a bad value.
    """
    if model_arch not in ARCHITECTURES:
        raise ValueError(f"model_arch={model_arch!r} is unknown: expected one of {tuple(ARCHITECTURES)}")
    depth, dim = ARCHITECTURES[model_arch]
    name = os.fspath(pretrained)
    path = Path(_download(name.removeprefix(_HUB), local_dir) if name.startswith(_HUB) else name) if name else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(
            f"pretrained={name!r} is not a file: expected one, {_HUB}OWNER/NAME, or '' for random weights"
        )
    model = LongNetViT(
        in_chans,
        dim,
        depth,
        slide_ngrids,
        tile_size,
        max_wsi_size,
        partial(nn.LayerNorm, eps=1e-6),
        global_pool,
        dropout,
        drop_path_rate,
    )
    if path is not None:
        weights = read_checkpoint(path).encoder
        if (found := channels_of(weights)) != in_chans:
            raise ValueError(f"in_chans={in_chans}: expected {found}, the channels that {path} takes")
        with named(path):
            model.load_upstream(weights)
    return model.eval()


def drop_in(*, replace: bool = False) -> None:
    """Make ``from gigapath.slide_encoder import create_model, LongNetViT`` give this library's.

    Call it before what imports the original. ``flash_attn`` is not imitated: what asserts its version needs the lines of
    docs/gigapath.md.

    Args:
        replace: also where the original is installed.

    Raises:
        ImportError: the original is installed, or imported already, and ``replace`` is False.
    """
    if isinstance(sys.modules.get("gigapath.slide_encoder"), _Module):
        return
    if not replace and _is_installed():
        raise ImportError("gigapath is installed: expected drop_in(replace=True) to put this library in its place")
    package, module = _Module("gigapath"), _Module("gigapath.slide_encoder")
    package.__path__ = []
    for name, value in {"create_model": create_model, "LongNetViT": LongNetViT}.items():
        setattr(module, name, value)
    package.slide_encoder = module  # type: ignore[attr-defined]
    for one in (package, module):
        one.__spec__ = importlib.util.spec_from_loader(one.__name__, loader=None, is_package=one is package)
        sys.modules[one.__name__] = one


def _is_installed() -> bool:
    """Whether the original can be imported: some other folder of its name cannot."""
    spec = importlib.util.find_spec("gigapath")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return "gigapath.slide_encoder" in sys.modules or any((Path(one) / "slide_encoder.py").is_file() for one in folders)


class _Module(ModuleType):
    """A module of :func:`drop_in`."""


def _download(repository: str, cache: str | None) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{_HUB}{repository} needs huggingface_hub, in a checkout of longnet pip install '.[slides]': expected that, or the "
            f"path of a {_FILE}",
            name="huggingface_hub",
        ) from None
    try:
        return hf_hub_download(repository, _FILE, cache_dir=cache)
    except Exception as error:
        # The hub's client raises errors of many types.
        raise OSError(
            f"{_HUB}{repository} could not be downloaded: {type(error).__name__}: {' '.join(str(error).split())} Expected a "
            f"connection and a token that may read it (HF_TOKEN), or the path of a {_FILE}"
        ) from error


def _keys(model: LongNetViT) -> dict[str, str]:
    """Our keys to the original's, but for modules that were added, an adapter say."""
    own, keys = model.upstream_names(), {}
    for key, _ in model.named_parameters():
        module, _, kind = key.rpartition(".")
        if key in own or module in own:
            keys[key] = own[key] if key in own else f"{own[module]}.{kind}"
    return keys


def _to_upstream_keys(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for ours, theirs in _keys(model).items():
        state[prefix + theirs] = state.pop(prefix + ours)


def _from_upstream_keys(model: Any, state: Any, prefix: str, *_: Any) -> None:
    for ours, theirs in _keys(model).items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)
