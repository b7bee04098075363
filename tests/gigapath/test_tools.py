"""The calls of TRIDENT, Patho-Bench, STAMP and LazySlide, after the lines of docs/gigapath.md, against the original's arithmetic.

The tools themselves are stand-ins: what they call, with which arguments and dtypes, restated.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import upstream
from huggingface_hub import hf_hub_download
from slides import encoder
from torch import Tensor, nn

import longnet.gigapath.encoder
import longnet.gigapath.upstream
from longnet.gigapath import ClassificationHead, drop_in
from longnet.gigapath.upstream import LongNetViT, create_model

ARCH, CHANNELS = "gigapath_slide_enc12l768d", 1536
LENGTHS, RATES = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
PAGE = (Path(__file__).parents[2] / "docs" / "gigapath.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


class Places:
    """``upstream.position_table`` by rows, as they are asked for: the whole of 1,000 cells a side is large."""

    def __init__(self, grid: int, dim: int) -> None:
        self.grid, self.dim = grid, dim

    def __getitem__(self, place: Tensor) -> Tensor:
        omega = 1 / 10000 ** (torch.arange(self.dim // 4, dtype=torch.float64) / (self.dim / 4))
        parts = [axis[..., None] * omega for axis in ((place - 1) % self.grid, (place - 1) // self.grid)]
        return torch.cat([part for half in parts for part in (half.sin(), half.cos())], -1)


def test_the_places_are_the_tables_rows() -> None:
    place = torch.tensor([1, 2, 7, 17, 36])
    assert torch.equal(Places(6, 16)[place], upstream.position_table(6, 16)[place])


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Random weights of 12 layers in slide_encoder.pth of the working folder, which the hub gives too; the drop-in is undone."""
    for module in (longnet.gigapath.encoder, longnet.gigapath.upstream):
        monkeypatch.setattr(module, "ARCHITECTURES", {ARCH: (12, 32)})
    monkeypatch.setattr(upstream, "position_table", Places)
    monkeypatch.chdir(tmp_path)
    random = encoder(12, torch.float32, in_dim=CHANNELS).upstream_state_dict()
    torch.save({"model": random}, "slide_encoder.pth")

    def download(repository: str, filename: str, cache_dir: str | None = None) -> str:
        assert (repository, filename) == ("prov-gigapath/prov-gigapath", "slide_encoder.pth")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    before = set(sys.modules)
    yield random
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("gigapath", "trident", "stamp", "lazyslide_models"):
            del sys.modules[name]


def install(name: str, **content: object) -> None:
    """A module that can be imported, with the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        one = sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        one.__path__ = []
    for key, value in content.items():
        setattr(one, key, value)


def run_lines(tool: str) -> None:
    (lines,) = [block for block in BLOCKS if f"from {tool}" in block]
    exec(compile(lines, f"docs/gigapath.md, {tool}", "exec"), {})


def slide(tiles: int = 600, tile: int = 256, side: int = 300) -> tuple[Tensor, Tensor]:
    """(L, CHANNELS) float32 and (L, 2) int64 pixels, of the same tissue for any tile."""
    generator = torch.Generator().manual_seed(1)
    cell = torch.randperm(side * side, generator=generator)[:tiles]
    return torch.randn(tiles, CHANNELS, generator=generator), torch.stack((cell // side, cell % side), 1) * tile


def original(
    weights: dict[str, Tensor], x: Tensor, coords: Tensor, tile: int, all_layers: bool, global_pool: bool
) -> list[Tensor]:
    double = {name: tensor.double() for name, tensor in weights.items()}
    with torch.no_grad():
        return upstream.slide_encoder(
            double, x.double()[None], coords.double()[None], 16, LENGTHS, RATES,
            grid=1000, tile=tile, all_layers=all_layers, global_pool=global_pool,
        )  # fmt: skip


def assert_close(got: Any, want: Tensor) -> None:
    got = torch.as_tensor(np.asarray(got)).double()
    assert got.shape == want.squeeze().shape
    assert float((got - want.squeeze()).abs().max() / want.abs().max()) < 1e-5


class TridentEncoder(nn.Module):
    """TRIDENT's base class and its GigaPathSlideEncoder."""

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.model, self.precision, self.embedding_dim = self._build(pretrained=pretrained)
        self.model.requires_grad_(False).eval()

    def _build(self, pretrained: bool = True) -> tuple[nn.Module, torch.dtype, int]:
        import flash_attn  # type: ignore[import-not-found]

        assert flash_attn.__version__ == "2.5.8"
        raise AssertionError

    def forward(self, batch: dict[str, Any], device: str = "cuda") -> Tensor:
        self.model.tile_size = batch["attributes"]["patch_size_level0"]
        out: Tensor = self.model(batch["features"].to(device), batch["coords"].to(device), all_layer_embed=True)[11]
        return out


@pytest.fixture
def trident(weights: dict[str, Tensor]) -> TridentEncoder:
    install("trident.slide_encoder_models.load", GigaPathSlideEncoder=TridentEncoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TridentEncoder, "_build", TridentEncoder._build)
        run_lines("trident")
        made = TridentEncoder()
    assert made.precision == torch.float16 and made.embedding_dim == 768
    return made


@pytest.mark.parametrize(("tile", "level0"), [(256, 256), (512, np.int64(512)), (512, torch.tensor(512))])
def test_trident(weights: dict[str, Tensor], trident: TridentEncoder, tile: int, level0: Any) -> None:
    """float32 features of a batch of one, int64 pixels; Patho-Bench's attribute is what a collated batch holds."""
    x, coords = slide(tile=tile)
    batch = {"features": x[None], "coords": coords[None], "attributes": {"patch_size_level0": level0}}
    got = trident.to("cpu").eval()(batch, "cpu")
    want = original(weights, *slide(), 256, True, True)[11]
    assert_close(got.float().cpu().numpy().squeeze(), want)
    with torch.autocast("cpu", enabled=trident.precision != torch.float32):
        half = trident(batch, "cpu")
    assert float((half.double() - want).abs().max()) < 0.1


def test_patho_bench_means_over_slides_and_names_a_missing_size(
    weights: dict[str, Tensor], trident: TridentEncoder
) -> None:
    batches = [
        {"features": x[None], "coords": coords[None], "attributes": {"patch_size_level0": size}}
        for size in (256, 512)
        for x, coords in [slide(400, size)]
    ]
    got = torch.stack([trident.forward(batch, "cpu") for batch in batches]).mean(0)
    assert_close(got.numpy()[0], original(weights, *slide(400), 256, True, True)[11])
    with pytest.raises(TypeError, match="tile_size=None"):
        trident.forward(batches[0] | {"attributes": {"patch_size_level0": None}}, "cpu")


class StampEncoder:
    """STAMP's Gigapath."""

    def __init__(self) -> None:
        from gigapath import slide_encoder  # type: ignore[import-not-found]

        source = "hf_hub:prov-gigapath/prov-gigapath"
        self.model = slide_encoder.create_model(source, ARCH, CHANNELS, global_pool=True)
        self.precision = torch.float16

    def _generate_slide_embedding(self, feats: Tensor, device: str, coords: Any = None) -> np.ndarray:
        pixels = torch.tensor(coords.coords_um / coords.mpp, dtype=torch.float32).unsqueeze(0).to(device).half()
        self.model.to(self.precision)
        with torch.inference_mode():
            embedding = self.model(feats.unsqueeze(0).half().to(device), pixels)
        return torch.cat(embedding, dim=0).detach().squeeze().cpu().numpy()  # type: ignore[no-any-return]


def test_stamp(weights: dict[str, Tensor]) -> None:
    drop_in()
    install("stamp.encoding.encoder.gigapath", Gigapath=StampEncoder)
    # Tiles of 224 pixels, which the original puts into cells of 256.
    x, coords = slide(50, 224, side=9)
    stamps = SimpleNamespace(coords_um=coords.numpy() / 224 * 256, mpp=256 / 224)
    want = original(weights, x, coords, 256, False, True)[0].squeeze()
    got = StampEncoder()._generate_slide_embedding(x.half(), "cpu", stamps)
    assert float((torch.from_numpy(got).double() - want).abs().max()) < 0.05
    x, coords = slide(600, 224)
    far = SimpleNamespace(coords_um=coords.numpy() / 224 * 256, mpp=256 / 224)
    with pytest.raises(TypeError, match="float16, which rounds pixels beyond 2,048: .*moves tiles"):
        StampEncoder()._generate_slide_embedding(x.half(), "cpu", far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StampEncoder, "_generate_slide_embedding", StampEncoder._generate_slide_embedding)
        run_lines("stamp")
        one = StampEncoder()
        one.precision = torch.float32
        assert_close(one._generate_slide_embedding(x, "cpu", far), original(weights, x, coords, 256, False, True)[0])
        one.precision = torch.float16
        got = one._generate_slide_embedding(x.half(), "cpu", far)
    want = original(weights, x, coords, 256, False, True)[0].squeeze()
    assert got.dtype == np.float16 and float((torch.from_numpy(got).double() - want).abs().max()) < 0.05


@pytest.mark.parametrize("tile", [256, 512])
def test_lazyslide(weights: dict[str, Tensor], tile: int) -> None:
    drop_in()

    class Encoder:
        """lazyslide-models' GigaPathSlideEncoder, and its base's ``to``."""

        def __init__(self) -> None:
            from gigapath import slide_encoder

            slide_encoder.LongNetViT.get_optimal_segment_length = lambda *_: "[]"
            self.model = slide_encoder.create_model(
                "hf_hub:prov-gigapath/prov-gigapath", ARCH, CHANNELS, local_dir="home"
            )
            del slide_encoder.LongNetViT.get_optimal_segment_length

        def encode_slide(self, embeddings: Tensor, coords: Any = None) -> dict[str, Tensor]:
            return {"embeddings": self.model(embeddings, coords).squeeze()}

    registry = {"gigapath-slide-encoder": Encoder}
    install("lazyslide_models", MODEL_REGISTRY=registry)
    run_lines("lazyslide_models")
    registry["gigapath-slide-encoder"].tile_size = tile  # type: ignore[attr-defined]
    x, coords = slide(tile=tile)
    with torch.inference_mode():
        made = registry["gigapath-slide-encoder"]()
        made.model.to("cpu")
        got = made.encode_slide(x.unsqueeze(0), coords.unsqueeze(0))["embeddings"]
    assert_close(got.numpy(), original(weights, *slide(), 256, False, False)[0])


def test_the_original_is_not_replaced_unasked(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gigapath").mkdir()
    (tmp_path / "gigapath" / "__init__.py").touch()
    (tmp_path / "gigapath" / "slide_encoder.py").write_text("create_model = LongNetViT = None")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"gigapath is installed: expected drop_in\(replace=True\)"):
        drop_in()
    drop_in(replace=True)
    from gigapath import slide_encoder

    assert slide_encoder.LongNetViT is LongNetViT and slide_encoder.create_model is create_model


def test_create_model_refuses_what_the_original_passes_over(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="pretrained='no.pth' is not a file"):
        create_model("no.pth", ARCH, CHANNELS)
    with pytest.raises(ValueError, match="model_arch='huge' is unknown"):
        create_model("", "huge", CHANNELS)
    with pytest.raises(ValueError, match="in_chans=1024: expected 1536, the channels that slide_encoder.pth takes"):
        create_model("slide_encoder.pth", ARCH, 1024)
    with pytest.raises(ValueError, match=r"embed_dim=256.*expected mlp_ratio=4 and .*\(\(12, 32\),\)"):
        LongNetViT(embed_dim=256)
    with pytest.raises(TypeError, match="norm_layer makes a Identity: expected a LayerNorm"):
        LongNetViT(embed_dim=32, norm_layer=nn.Identity)
    head = ClassificationHead(create_model("", ARCH, CHANNELS), 3, layers=(1,))
    x, coords = slide(5)
    assert head(x[None], coords[None]).shape == (1, 3)
    torch.testing.assert_close(head.encoder(x[None], coords), head.encoder(x[None], coords[None]))
    # Segment lengths follow the tile size when it is made, and not later.
    small = create_model("", ARCH, CHANNELS, tile_size=512)
    assert small.config.segment_lengths == (1024, 4096, 16384, 65536, 262144)
    small.tile_size = 256
    assert small.config.segment_lengths[-1] == 262144 and LongNetViT(embed_dim=32).norm.eps == 1e-5

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match=r"hf_hub:a/b could not be downloaded: ConnectionError: offline .*HF_TOKEN"):
        create_model("hf_hub:a/b", ARCH, CHANNELS)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="hf_hub:a/b could not be downloaded: LocalEntryNotFoundError: "):
        create_model("hf_hub:a/b", ARCH, CHANNELS, "empty cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs huggingface_hub.*'.\[slides\]'"):
        create_model("hf_hub:a/b", ARCH, CHANNELS)


def test_state_dicts_have_the_originals_keys(weights: dict[str, Tensor]) -> None:
    model = create_model("slide_encoder.pth", ARCH, CHANNELS)
    held = nn.ModuleDict({"slide_encoder": model, "classifier": nn.Linear(32, 2)})
    names = held.state_dict()
    assert set(names) == {f"slide_encoder.{name}" for name in weights} | {"classifier.weight", "classifier.bias"}
    other = nn.ModuleDict({"slide_encoder": create_model("", ARCH, CHANNELS)})
    found = other.load_state_dict(names, strict=False)
    assert found.missing_keys == [] and sorted(found.unexpected_keys) == ["classifier.bias", "classifier.weight"]
    for name, tensor in other["slide_encoder"].state_dict().items():
        assert torch.equal(tensor, weights[name])
