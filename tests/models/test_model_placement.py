"""Models whose weights do not say a dtype or device: quantised by torch, on disk, on several devices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longnet import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.compress import prune_heads, quantization
from longnet.models import LongNetCache
from longnet.models.placement import device_of
from longnet.nn.projections import is_as_its_class

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|torch.quantize|TypedStorage)")

TIED = pytest.mark.parametrize("tied", [True, False])


def model(tied: bool = True, **changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(LongNetConfig.preset("nano", tie_embeddings=tied, **changes)).eval()


def tokens() -> Tensor:
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))


def quantised(lm: LongNetLM, *, table: bool) -> LongNetLM:
    ao: Any = torch.ao.quantization
    spec = {nn.Linear: ao.default_dynamic_qconfig}
    if table:
        spec[nn.Embedding] = ao.float_qparams_weight_only_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: LongNetLM = ao.quantize_dynamic(lm, spec)
    return made


def in_chunks(lm: LongNetLM, ids: Tensor) -> Tensor:
    cache = lm.new_cache(2)
    return torch.cat([lm(part, cache=cache) for part in ids.split([13, 1, 26], 1)], 1)


@TIED
@pytest.mark.parametrize("table", [True, False])
def test_a_model_that_torch_quantised_reads_streams_and_generates(tied: bool, table: bool) -> None:
    plain, ids = model(tied), tokens()
    lm, want = quantised(plain, table=table), plain(ids)
    for got in (lm(ids), in_chunks(lm, ids)):
        assert (got - want).norm() < 0.1 * want.norm()
    assert lm.new_cache(2).layers[0].dtype == torch.float32
    assert lm.generate(ids, 3, temperature=0).shape == (2, 43)
    torch.testing.assert_close(lm.loss(ids[:, :-1], ids[:, 1:]), plain.loss(ids[:, :-1], ids[:, 1:]), rtol=0.05, atol=0)


def test_an_encoder_whose_table_is_quantised_takes_embeddings_of_its_norms_dtype() -> None:
    torch.manual_seed(0)
    encoder = LongNetEncoder(LongNetConfig.preset("nano", causal=False)).eval()
    lm = quantised(encoder, table=True)  # type: ignore[arg-type]
    x = torch.randn(2, 40, 32)
    assert (lm(embeddings=x) - encoder(embeddings=x)).norm() < 0.1 * encoder(embeddings=x).norm()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="embeddings has dtype torch.float64 and the model torch.float32"):
        lm(embeddings=x.double())  # type: ignore[call-arg]


@TIED
@pytest.mark.parametrize("on_disk", [("embedding", "blocks.1"), ("blocks.0", "norm")])
def test_a_model_that_is_partly_on_disk_computes_what_it_did(
    tied: bool, on_disk: tuple[str, ...], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, lm, ids = model(tied), model(tied), tokens()
    parts = ("embedding", "blocks.0", "blocks.1", "norm", *(() if tied else ("head",)))
    places = {name: "disk" if name in on_disk else "cpu" for name in parts}
    accelerate.dispatch_model(lm, places, main_device="cpu", offload_dir=tmp_path)
    assert any(weight.is_meta for weight in lm.parameters())
    assert torch.equal(lm(ids), plain(ids))
    assert torch.equal(in_chunks(lm, ids), in_chunks(plain, ids))
    assert torch.equal(lm.generate(ids, 3, seed=0), plain.generate(ids, 3, seed=0))
    # Its weights are there only while the module itself is called.
    assert not is_as_its_class(lm.blocks[0].attention.q_proj, nn.Linear)
    with pytest.raises(ValueError, match="prune heads before quantising and before dispatching"):
        prune_heads(lm, {0: [1]})


def test_a_layers_cache_is_where_the_layer_computes() -> None:
    lm = model()
    lm.blocks[1].to("meta")
    assert [layer.device.type for layer in lm.new_cache(1)] == ["cpu", "meta"]
    # accelerate says where: its weights may be elsewhere meanwhile.
    lm.blocks[0].attention._hf_hook = type("Hook", (), {"execution_device": "meta"})()  # type: ignore[assignment]
    assert [layer.device.type for layer in lm.new_cache(1)] == ["meta", "meta"]


def test_tokens_on_another_device_are_refused_unless_they_are_moved() -> None:
    lm, ids = model(), tokens().to("meta")
    with pytest.raises(ValueError, match="tokens is on meta and the model on cpu"):
        lm(ids)
    lm.embedding._hf_hook = type("Hook", (), {"execution_device": "cpu"})()  # type: ignore[assignment]
    lm.check_tokens(ids)
    assert device_of(lm.embedding) == torch.device("cpu") and device_of(nn.Identity()) == torch.device("cpu")


def test_as_many_devices_as_layers() -> None:
    with pytest.raises(ValueError, match="has 1 entries: expected one for each of 2 layers"):
        LongNetCache(LongNetConfig.preset("nano"), 1, device=["cpu"])


def test_what_torch_quantised_is_not_taken_for_plain_weights() -> None:
    with pytest.raises(ValueError, match=r"weights are \['torch.ao.nn.quantized.*Linear'\]: expected one of"):
        quantization(quantised(model(), table=False))
