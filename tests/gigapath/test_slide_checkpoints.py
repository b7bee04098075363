"""Checkpoints by their upstream names, and the heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from slides import encoder, slides

from longnet.gigapath import ARCHITECTURES, ClassificationHead, RegressionHead, SlideEncoder, SurvivalHead


def test_the_published_architectures() -> None:
    sizes = {}
    for arch, (layers, dim) in ARCHITECTURES.items():
        weights = SlideEncoder(dim, layers, device="meta").upstream_state_dict()
        sizes[arch] = (len(weights), round(sum(x.numel() for x in weights.values()) / 1e6, 1))
    assert sizes["gigapath_slide_enc12l768d"] == (247, 86.3)
    assert list(ARCHITECTURES.values()) == [(12, 768), (24, 1024), (12, 1536)]


def test_the_layout_of_a_checkpoint() -> None:
    weights = encoder(1).upstream_state_dict()
    layer = [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn.inner_attn_ln"),
        *("self_attn_layer_norm", "final_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm"),
    ]
    modules = ["patch_embed.proj", "norm", "encoder.layer_norm", *(f"encoder.layers.0.{name}" for name in layer)]
    assert set(weights) == {"cls_token", *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet.gigapath.encoder.ARCHITECTURES", {"small": (2, 32)})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["dict", "nested", "pth", "flat.pth", "safetensors"])
def test_from_a_checkpoint(kind: str, tmp_path: Path) -> None:
    weights = SlideEncoder(32, 2).upstream_state_dict()
    weights = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    path = tmp_path / kind
    source: object = path
    if kind == "dict":
        source = weights
    elif kind == "nested":
        source = {"model": weights, "epoch": 3}
    elif kind == "safetensors":
        path = path.with_name("x.safetensors")
        save_file(weights, path)
        source = str(path)
    else:
        path = path.with_name("x.pth")
        torch.save(weights if kind == "flat.pth" else {"model": weights}, path)
        source = path
    model = SlideEncoder.from_checkpoint(source, "small")  # type: ignore[arg-type]
    assert not model.training
    for name, tensor in model.upstream_state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.usefixtures("small")
def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    weights = SlideEncoder(32, 2).upstream_state_dict()
    del weights["encoder.layers.1.ffn.fc1.bias"]
    weights["pos_embed"] = torch.zeros(1)
    weights["norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="do not fit") as caught:
        SlideEncoder.from_checkpoint(weights, "small")
    said = str(caught.value)
    assert "missing: encoder.layers.1.ffn.fc1.bias;" in said
    assert "unexpected: pos_embed;" in said
    assert "norm.weight (3,) instead of (32,)" in said
    with pytest.raises(ValueError, match="arch='large' is unknown"):
        SlideEncoder.from_checkpoint(weights, "large")
    with pytest.raises(TypeError, match="expected a tensor"):
        SlideEncoder.from_checkpoint({"norm.weight": 1}, "small")
    with pytest.raises(TypeError, match="expected tensors by name"):
        SlideEncoder.from_checkpoint(3, "small")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        SlideEncoder.from_checkpoint(tmp_path / "none.pth", "small")
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match=name):
            SlideEncoder.from_checkpoint(tmp_path / name, "small")


class Unsafe:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


@pytest.mark.usefixtures("small")
def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Unsafe()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="tensors alone"):
        SlideEncoder.from_checkpoint(tmp_path / "x.pth", "small")
    assert capsys.readouterr().out == ""


def test_heads_learn_and_freeze() -> None:
    x, coords = slides(30, batch=4)
    mask = torch.zeros(4, 30, dtype=torch.bool)
    mask[1, 20:] = True
    head = ClassificationHead(encoder(2), 3, layers=(1, -1))
    logits = head(x, coords, mask)
    assert logits.shape == (4, 3)
    head.loss(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for name, p in head.named_parameters() if "encoder_norm" not in name)
    frozen = RegressionHead(encoder(2), 2, freeze=True).train()
    assert not frozen.encoder.training and frozen.linear.training
    frozen.loss(frozen(x, coords), torch.randn(4, 2)).backward()
    assert {name for name, p in frozen.named_parameters() if p.grad is not None} == {"linear.weight", "linear.bias"}


def test_the_survival_loss_is_the_likelihood() -> None:
    head = SurvivalHead(encoder(1), 4)
    logits = torch.randn(3, 4, dtype=torch.float64)
    hazard = logits.sigmoid()
    want = [
        hazard[0, 2] * (1 - hazard[0, 0]) * (1 - hazard[0, 1]),
        hazard[1, 0],
        (1 - hazard[2]).prod(),
    ]
    got = head.loss(logits, torch.tensor([2, 0, 3]), torch.tensor([True, True, False]))
    torch.testing.assert_close(got.double(), -torch.stack(want).log().mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.survival(logits)[2, 3].double(), want[2], rtol=1e-5, atol=1e-6)


def test_bad_heads() -> None:
    model = encoder(1)
    with pytest.raises(TypeError, match="expected a SlideEncoder"):
        ClassificationHead(torch.nn.Linear(1, 1), 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="outputs=2.0"):
        ClassificationHead(model, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outputs=0"):
        ClassificationHead(model, 0)
    for layers in ((), (2,), (-3,)):
        with pytest.raises(ValueError, match="of the 2 read-outs"):
            ClassificationHead(model, 2, layers=layers)
    with pytest.raises(ValueError, match="target has shape"):
        RegressionHead(model, 2).loss(torch.randn(3, 2), torch.randn(3))
    head = SurvivalHead(model, 4)
    with pytest.raises(ValueError, match="expected 0 to 3"):
        head.loss(torch.randn(1, 4), torch.tensor([4]), torch.tensor([True]))
    with pytest.raises(ValueError, match="event has shape"):
        head.loss(torch.randn(1, 4), torch.tensor([1]), torch.tensor([True, False]))
