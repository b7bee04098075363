"""The encoder compiled: the same results, from one graph for slides of all sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from slides import encoder, slides
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longnet.gigapath import SlideEncoder, passes
from longnet.gigapath.readout import read_by_first_token
from longnet.nn import norm_linear as joined
from longnet.nn import projections as normed

# Torch's own tracing looks at tensors of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
RECOMPUTE = ("ffn", "block", "elementwise", "none")
# Loops of single numbers: the steps are the same on every processor, and compile in half the time.
scalar = torch._inductor.config.patch({"cpp.simdlen": 1})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs. Without torch's code generator, which takes most of the time of compiling; two tests have it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = {
        one: passes.compile_for_any_size(one, fullgraph=True, backend=counter)
        for one in (passes.embed, passes.read_out)
    }
    monkeypatch.setattr(passes, "compiled", lambda function: compiled[function])
    yield counter
    torch._dynamo.reset()


def gradients(model: torch.nn.Module, x: Tensor, coords: Tensor) -> list[Tensor]:
    (out,) = model(x, coords)
    towards = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * towards).sum(), list(model.parameters()))]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_results_and_gradients_are_the_same(recompute: str, counted: CompileCounterWithBackend) -> None:
    model = encoder(3, recompute=recompute, dropout=0.0, drop_path=0.0).train()
    compiled = []
    for tiles in (1300, 70, 2200):
        x, coords = slides(tiles)
        model.compiled = False
        expected = gradients(model, x, coords)
        model.compiled = True
        for got, want in zip(gradients(model, x, coords), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        compiled.append(counted.frame_count)
    # Two functions, each once.
    assert compiled == [2, 2, 2]


@pytest.mark.parametrize("global_pool", [False, True])
def test_everything_that_forward_does(global_pool: bool, counted: CompileCounterWithBackend) -> None:
    model = encoder(2, global_pool=global_pool, dropout=0.3, drop_path=0.5, recompute="elementwise")
    # Two slides of each size: a batch of one slide would be compiled for itself, as other tests do.
    x, coords = slides(60, batch=4)
    absent = torch.zeros(4, 60, dtype=torch.bool)
    absent[0, 10:30] = True
    absent[2, 40:] = True
    with torch.no_grad():
        for options in ({}, {"all_layer_embed": True}, {"padding_mask": absent}):
            model.compiled = False
            expected = model(x, coords, **options)
            model.compiled = True
            for got, want in zip(model(x, coords, **options), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        # Dropout is off in evaluation.
        assert torch.equal(model(x, coords)[0], model(x, coords)[0])
    assert counted.frame_count >= 1


def test_masks_drop_as_often_as_dropout_and_keep_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    block, x = encoder(1, dropout=0.3).train().blocks[0], torch.full((2, 500, 64), 3.0)
    for kept in block._masks(x, 500):
        assert kept is not None
        out = block._drop(x, kept)
        assert out.max() == pytest.approx(3.0 / 0.7)
        assert abs(float((out == 0).float().mean()) - 0.3) < 0.01
        torch.testing.assert_close(out == 0, ~kept)
    assert block.eval()._masks(x, 500) == (None, None)


@scalar
@pytest.mark.parametrize(
    ("recompute", "layers", "batch", "backend"),
    [
        # Torch's partition of the graph into forward and backward pass, which has refused such steps, without its code generator.
        ("block", 3, 1, "aot_eager_decomp_partition"),
        ("elementwise", 3, 2, "aot_eager_decomp_partition"),
        ("elementwise", 2, 1, "inductor"),
    ],
)
def test_dropout_of_some_tokens_compiles_and_is_drawn_anew(
    recompute: str, layers: int, batch: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    made = {
        one: passes.compile_for_any_size(one, fullgraph=True, backend=backend)
        for one in (passes.embed, passes.read_out)
    }
    monkeypatch.setattr(passes, "compiled", lambda function: made[function])
    options = {"recompute": recompute, "dropout": 0.3, "drop_path": 0.5, "compiled": True}
    model = encoder(layers, torch.float32, **options).train()
    x, coords = slides(1300, batch, dtype=torch.float32)
    read = read_by_first_token(model.blocks[0].attention.pattern, model.config.heads, 1301, x.device)
    assert len(read) < 1301
    first, second = (gradients(model, x, coords) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert all(bool(g.isfinite().all()) for g in first)


def test_a_model_of_one_layer(counted: CompileCounterWithBackend) -> None:
    model = encoder(1, dropout=0.0).train()
    x, coords = slides(40)
    expected = gradients(model, x, coords)
    model.compiled = True
    for got, want in zip(gradients(model, x, coords), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert counted.frame_count >= 1


@scalar
def test_with_torchs_code_generator_under_autocast() -> None:
    torch._dynamo.reset()
    model = encoder(2, torch.float32, recompute="elementwise", dropout=0.0, drop_path=0.0).train()
    found = {}
    for compiled in (False, True):
        model.compiled = compiled
        x, coords = slides(90, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found[compiled] = gradients(model, x, coords)
    # Both round to bfloat16, but not at the same places.
    for select in (slice(1), slice(1, None)):
        got, want = (torch.cat([x.flatten() for x in found[compiled][select]]) for compiled in (True, False))
        assert float((got - want).norm()) <= 0.03 * float(want.norm())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("recompute", ["ffn", "elementwise"])
def test_norms_and_projections_in_one_step(
    recompute: str, counted: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with kernels in Triton's interpreter: eager and compiled what modules give, but for rounding."""
    torch.manual_seed(0)
    model = SlideEncoder(256, 3, in_dim=24, recompute=recompute, dropout=0.0, drop_path=0.0).train()
    x, coords = slides(7, dtype=torch.float32)

    def gradients_of(compiled: bool) -> list[Tensor]:
        model.compiled = compiled
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, x, coords)
        return [one.double() for one in found]

    expected = gradients_of(False)
    monkeypatch.setattr(normed, "fits", lambda device, dtype, channels: dtype == torch.bfloat16)
    launches: list[int] = []
    backward = joined.norm_backward
    monkeypatch.setattr(joined, "norm_backward", lambda *args: (launches.append(len(args[0])), backward(*args))[1])
    found = gradients_of(False)
    # Of two layers the inputs' norm, that of attention's result, that before the feed-forward and that inside of it; the last
    # layer's first norm is read by one token alone.
    assert sorted(launches) == [1] * 9 + [3] * 2
    monkeypatch.setattr(joined, "norm_backward", backward)
    compiled = gradients_of(True)
    assert counted.frame_count > 0
    names = ["out", *[name for name, _ in model.named_parameters()]]
    for name, want, *both in zip(names, expected, found, compiled, strict=True):
        for got in both:
            # A key's bias moves all scores of a query alike: its gradient is rounding alone.
            assert "k_proj.bias" in name or (got - want).norm() <= 3e-2 * want.norm(), name
