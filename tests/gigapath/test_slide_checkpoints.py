"""Checkpoints by their upstream names, and the heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from slides import encoder, slides
from torch import nn

from longnet.gigapath import (
    ARCHITECTURES,
    ClassificationHead,
    RegressionHead,
    SlideEncoder,
    SurvivalHead,
    from_finetuned,
)
from longnet.gigapath.checkpoint import read_checkpoint


def test_the_published_architectures() -> None:
    sizes = {}
    for arch, (layers, dim) in ARCHITECTURES.items():
        weights = SlideEncoder(dim, layers, device="meta").upstream_state_dict()
        sizes[arch] = (len(weights), round(sum(x.numel() for x in weights.values()) / 1e6, 1))
    assert sizes["gigapath_slide_enc12l768d"] == (247, 86.3) and sizes["gigapath_slide_enc12l384d"] == (247, 21.9)
    assert list(ARCHITECTURES.values()) == [(12, 384), (12, 768), (24, 1024), (12, 1536)]


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


def test_weights_of_another_published_size_are_named(tmp_path: Path) -> None:
    file = tmp_path / "flash.pth"
    torch.save(SlideEncoder(384, 12, in_dim=16).upstream_state_dict(), file)
    with pytest.raises(
        ValueError, match=r"flash\.pth: weights of 12 layers of 384 .* arch='gigapath_slide_enc12l384d' \("
    ):
        SlideEncoder.from_checkpoint(file)


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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "prefixes", [("",), ("module.",), ("_orig_mod.",), ("model.backbone.",), ("module.slide_encoder.",)]
)
@pytest.mark.parametrize("containers", [(), ("model",), ("state_dict", "model")])
def test_wrappers_are_taken_off_and_said(
    prefixes: tuple[str], containers: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    weights = {name: torch.randn_like(x) for name, x in SlideEncoder(32, 2, in_dim=1024).upstream_state_dict().items()}
    source: dict[str, Any] = {prefixes[0] + name: tensor for name, tensor in weights.items()}
    for name in containers:
        source = {name: source, "epoch": 3}
    with caplog.at_level("INFO", "longnet"):
        model = SlideEncoder.from_checkpoint(source, "small")
    assert model.in_dim == 1024
    for name, tensor in model.upstream_state_dict().items():
        assert torch.equal(tensor, weights[name])
    notes = [f"took the tensors in {name!r}" for name in reversed(containers)]
    notes += [f"took the prefix {prefix!r} off {len(weights)} names" for prefix in prefixes if prefix]
    assert [record.message for record in caplog.records] == [f"checkpoint: {note}" for note in notes]


@pytest.mark.usefixtures("small")
def test_an_unknown_prefix_is_named_and_few_keys() -> None:
    weights = SlideEncoder(32, 2).upstream_state_dict()
    with pytest.raises(ValueError, match="do not fit") as caught:
        SlideEncoder.from_checkpoint({f"teacher.{name}": tensor for name, tensor in weights.items()}, "small")
    said = str(caught.value)
    assert "missing: cls_token, " in said and f"and {len(weights) - 4} more; unexpected: teacher.cls_token, " in said
    assert f"{len(weights)} of the unexpected names fit without their prefix 'teacher.': take it off" in said
    assert len(said) < 600
    with pytest.raises(ValueError, match=r"model.norm.weight and another tensor are both norm.weight"):
        SlideEncoder.from_checkpoint(
            {"norm.weight": weights["norm.weight"], "model.norm.weight": weights["norm.weight"]}, "small"
        )


@pytest.mark.usefixtures("small")
def test_a_fine_tuned_file_and_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = encoder(2, torch.float32).upstream_state_dict()
    file = {f"module.slide_encoder.{name}": tensor for name, tensor in weights.items()}
    file |= {"module.classifier.0.weight": torch.randn(3, 64), "module.classifier.0.bias": torch.randn(3)}
    torch.save(file, tmp_path / "best.pt")
    x, coords = slides(40, dtype=torch.float32)
    states = SlideEncoder.from_checkpoint(weights, "small")(x, coords, True)
    head = from_finetuned(tmp_path / "best.pt", "small", layers=(1, 2))
    assert not head.training and head.setting == "multi_class"
    want = torch.cat(states[1:], -1) @ file["module.classifier.0.weight"].T + file["module.classifier.0.bias"]
    torch.testing.assert_close(head(x, coords), want, rtol=1e-5, atol=1e-5)
    with caplog.at_level("INFO", "longnet"):
        alone = SlideEncoder.from_checkpoint(file, "small")(x, coords)[0]
    assert "found the head of a fine-tuned encoder, classifier.0.weight, classifier.0.bias" in caplog.text
    torch.testing.assert_close(alone, SlideEncoder.from_checkpoint(weights, "small")(x, coords)[0])
    with pytest.raises(
        ValueError, match=r"classifier.0.weight has shape \(3, 64\) and layers=\(2,\): expected .*1 \* 32"
    ):
        from_finetuned(file, "small", layers=(2,))
    with pytest.raises(ValueError, match=r"the head has \[\]: expected"):
        from_finetuned(weights, "small", layers=(2,))
    file["module.classifier.0.bias"] = torch.randn(2)
    with pytest.raises(ValueError, match=r"classifier.0.bias has shape \(2,\): expected \(3,\)"):
        from_finetuned(file, "small", layers=(1, 2))


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
    one, happened = torch.tensor([1, 0, 2]), torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match=r"event=\[1, 2, 1\]: expected True \(1\)"):
        head.loss(torch.zeros(3, 4), one, torch.tensor([1, 2, 1]))
    with pytest.raises(TypeError, match="interval has dtype torch.float32: expected integers"):
        head.loss(torch.zeros(3, 4), one.float(), happened)
    short = head.loss(torch.zeros(3, 4), one.int(), happened)
    torch.testing.assert_close(short, head.loss(torch.zeros(3, 4), one, happened.bool()))


def test_a_target_that_is_no_number_is_refused() -> None:
    head = RegressionHead(encoder(1), 2)
    with pytest.raises(ValueError, match=r"target=\[\[1.0, nan\]\]: expected finite numbers"):
        head.loss(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]]))


def test_a_checkpoint_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="^checkpoint is a Linear: expected tensors by name"):
        read_checkpoint(torch.nn.Linear(300, 300))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="checkpoint nowhere.pth does not exist"):
        read_checkpoint("nowhere.pth")


def test_the_loss_of_several_labels_is_a_sigmoid_each() -> None:
    head = ClassificationHead(encoder(1), 5, setting="multi_label")
    x, coords = slides(20, batch=2)
    logits = head(x, coords)
    target = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    p = logits.detach().sigmoid()
    want = -torch.where(target == 1, p.log(), (1 - p).log()).mean()
    for kind in (torch.int64, torch.bool, torch.float32, torch.float64):
        torch.testing.assert_close(head.loss(logits, target.to(kind)), want, rtol=1e-12, atol=0)
    head.loss(logits, target).backward()
    assert head.linear.bias.grad is not None
    torch.testing.assert_close(head.linear.bias.grad, ((p - target) / 10).sum(0))


@pytest.mark.parametrize("setting", [None, "binary", "multi_label"])
def test_one_output_learns(setting: Any) -> None:
    head = ClassificationHead(encoder(1), 1, setting=setting)
    logits = torch.tensor([[0.3], [-1.2], [2.0]], dtype=torch.float64, requires_grad=True)
    p = logits.detach()[:, 0].sigmoid()
    target = torch.tensor([1, 0, 0])
    want = -(p[0].log() + (1 - p[1]).log() + (1 - p[2]).log()) / 3
    for one in (target, target[:, None], target.bool(), target.float()):
        loss = head.loss(logits, one)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad[:, 0], (p - target) / 3)


@pytest.mark.parametrize(("outputs", "setting"), [(2, None), (2, "binary"), (2, "multi_class"), (4, None)])
def test_the_loss_of_classes_is_one_softmax(outputs: int, setting: Any) -> None:
    head = ClassificationHead(encoder(1), outputs, setting=setting)
    logits = torch.randn(3, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1, 0, outputs - 1])
    want = -logits.log_softmax(1)[torch.arange(3), target].mean()
    for one in (target, target.int(), nn.functional.one_hot(target, outputs).double()):
        torch.testing.assert_close(head.loss(logits, one), want, rtol=1e-12, atol=0)
    soft = torch.rand(3, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    want = -(logits.log_softmax(1) * soft).sum(1).mean()
    torch.testing.assert_close(head.loss(logits, soft), want, rtol=1e-12, atol=0)
    # Rounded to 8 bits a row still sums to 1.
    torch.testing.assert_close(head.loss(logits, soft.bfloat16()), want, rtol=1e-2, atol=0)


def test_targets_that_could_mean_something_else_are_refused() -> None:
    model = encoder(1)
    classes = ClassificationHead(model, 5)
    labels = ClassificationHead(model, 5, setting="multi_label")
    binary = ClassificationHead(model, 1)
    logits, several = torch.randn(2, 5), torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    for head, given, target, match in [
        (classes, logits, several, r"rows of target sum to \[2.0\] .* setting='multi_label'"),
        (classes, logits, 0 * several, r"rows of target sum to \[0.0, 0.0\]"),
        (classes, logits, several.long(), "dtype torch.int64 .* setting='multi_label'"),
        (classes, logits, several.bool(), "dtype torch.bool .* setting='multi_label'"),
        (classes, logits, 2 * several - 1, "expected values from 0 to 1"),
        (classes, logits, several[:, :4], r"target has shape \(2, 4\)"),
        (classes, logits, torch.tensor([[1], [2]]), r"target has shape \(2, 1\)"),
        (classes, logits, torch.tensor([1.0, 2.0]), "expected classes as integers"),
        (classes, logits, torch.tensor([1, 5]), "expected classes from 0 to 4"),
        (classes, logits, torch.tensor([-1, 2]), "expected classes from 0 to 4"),
        (labels, logits, torch.tensor([1, 2]), r"target has shape \(2,\): expected \(B, outputs\) = \(2, 5\)"),
        (labels, logits, 2 * several, "expected values from 0 to 1"),
        (labels, logits, several * torch.nan, "expected values from 0 to 1"),
        (binary, logits[:, :1], torch.tensor([0, 2]), "expected values from 0 to 1"),
        (binary, logits[:, :1], several[:, :2], r"target has shape \(2, 2\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=match):
            head.loss(given, target)
    for outputs, setting, match in [
        (1, "multi_class", "always 0, expected setting='binary'"),
        (3, "binary", "setting='binary' with outputs=3"),
        (2, "multi-label", "setting='multi-label' is unknown"),
    ]:
        with pytest.raises(ValueError, match=match):
            ClassificationHead(model, outputs, setting=setting)  # type: ignore[arg-type]


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
