"""What wraps, replaces or hooks a module of a slide encoder is called, however the encoder runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from slides import encoder, slides
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard

import longnet.gigapath.encoder
from longnet.gigapath import SlideEncoder, passes
from longnet.gigapath.readout import read_by_first_token

# Torch's own tracing looks at tensors of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
TILES = 40


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So short that the class token reads some tiles alone, and the layer before the last is computed for them alone."""
    monkeypatch.setattr(longnet.gigapath.encoder, "segment_lengths", lambda *_: (8, 12, 16, 24, 64))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class PassesAll(Around):
    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.inner(*inputs, **options)


def replaced_forward(block: nn.Module) -> nn.Module:
    own = block.forward
    block.forward = lambda x: own(x)  # type: ignore[method-assign]
    return block


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": checkpoint_wrapper,
    "around": Around,
    "passes_all": PassesAll,
    "forward": replaced_forward,
}
WAYS: list[dict[str, Any]] = [
    {},
    {"all_layer_embed": True},
    {"layers": (1, -1)},
    {"padding_mask": torch.arange(TILES)[None] % 5 == 0},
]


def outputs(model: SlideEncoder) -> list[Tensor]:
    x, coords = slides(TILES)
    return [one for way in WAYS for one in model(x, coords, **way)]


def gradients(model: nn.Module) -> list[Tensor]:
    (out,) = model(*slides(TILES))
    towards = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * towards).sum(), list(model.parameters())))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_class_token_reads_some_tiles_alone() -> None:
    pattern = encoder(1).blocks[0].attention.pattern
    assert len(read_by_first_token(pattern, 16, TILES + 1, torch.device("cpu"))) < TILES


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_block_is_called(wrapper: str, global_pool: bool) -> None:
    model = encoder(3, global_pool=global_pool)
    expected = outputs(model)
    for places in ((0,), (1,), (2,), (0, 1, 2)):
        changed = copy.deepcopy(model)
        for place in places:
            changed.blocks[place] = WRAPPERS[wrapper](changed.blocks[place])
        assert_same(outputs(changed), expected)
        calls = [getattr(changed.blocks[place], "calls", None) for place in places]
        # With layers (1, -1) and all others the last block runs: once in every way.
        assert calls in ([None] * len(places), [len(WAYS)] * len(places))


@pytest.mark.parametrize("recompute", ["ffn", "block", "elementwise", "none"])
def test_gradients_through_wrapped_blocks(recompute: str) -> None:
    model = encoder(3, recompute=recompute, dropout=0.0, drop_path=0.0).train()
    expected = gradients(model)
    for place, wrapper in enumerate(("checkpoint", "around", "passes_all")):
        model.blocks[place] = WRAPPERS[wrapper](model.blocks[place])
    assert_same(gradients(model), expected)


@torch.no_grad()
def test_blocks_that_are_compiled_one_by_one() -> None:
    model = encoder(3)
    x, coords = slides(TILES)
    expected = model(x, coords)
    torch._dynamo.reset()
    model.blocks[1] = compiled(model.blocks[1])
    assert_same(model(x, coords), expected)
    model.blocks[2].compile(backend="eager")
    assert_same(model(x, coords), expected)
    assert_same(list(model.upstream_state_dict().values()), list(encoder(3).upstream_state_dict().values()))
    torch._dynamo.reset()


@torch.no_grad()
def test_regions_that_accelerate_compiles() -> None:
    utils = pytest.importorskip("accelerate.utils")
    model = encoder(3)
    x, coords = slides(TILES)
    expected = model(x, coords)
    torch._dynamo.reset()
    assert_same(utils.compile_regions(model, backend="eager")(x, coords), expected)
    torch._dynamo.reset()


def test_adapters_of_projections() -> None:
    peft = pytest.importorskip("peft")
    x, coords = slides(TILES)
    base = encoder(3)
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, lora_dropout=0.2)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    weights = adapted.attention_weights(x, coords)
    with pytest.raises(ValueError, match=r"blocks.0.attention.q_proj holds base_layer.weight"):
        adapted.get_base_model().upstream_state_dict()
    got = adapted(x, coords)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_same(got, merged(x, coords))
    torch.testing.assert_close(weights, merged.attention_weights(x, coords))
    assert float((got[0] - base(x, coords)[0]).detach().abs().max()) > 0.01
    # An adapter's dropout is the same when it is computed again.
    grads = []
    for recompute in ("none", "ffn", "elementwise", "block"):
        model = encoder(3, dropout=0.0, drop_path=0.0, recompute=recompute)
        torch.manual_seed(2)
        model = peft.get_peft_model(model, config).train()
        torch.manual_seed(3)
        model(x, coords)[0].square().sum().backward()
        grads.append([one.grad for one in model.parameters() if one.requires_grad])
    for other in grads[1:]:
        assert_same(other, grads[0])


PLACES = [
    *(
        "",
        "attention_norm",
        "attention",
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.sub_norm",
    ),
    *("attention.dropout", "attention.out_proj", "dropout", "feed_forward_norm", "feed_forward", "feed_forward.fc1"),
    *("feed_forward.sub_norm", "feed_forward.fc2"),
]
KINDS = [
    *("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"),
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_every_kind_run(place: str) -> None:
    model = encoder(3, dropout=0.0, drop_path=0.0).train()
    expected = gradients(model)
    calls: dict[tuple[int, str], int] = {}
    for number, block in enumerate(model.blocks):
        for kind in KINDS:
            key = (number, kind)
            calls[key] = 0
            hook = lambda *_, key=key: calls.__setitem__(key, calls[key] + 1)  # noqa: E731
            getattr(block.get_submodule(place), kind)(hook)
    assert_same(gradients(model), expected)
    assert all(calls.values()), calls


@pytest.mark.parametrize("place", ["", "attention", "attention.v_proj", "feed_forward_norm"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_hook_that_changes_a_result_changes_the_encoders(number: int, place: str) -> None:
    model = encoder(3)
    # The same without a hook: a module in place of the other.
    other = copy.deepcopy(model)
    parent, _, name = f"blocks.{number}.{place}".rstrip(".").rpartition(".")
    inner = other.get_submodule(parent)._modules[name]
    assert inner is not None
    other.get_submodule(parent)._modules[name] = nn.Sequential(inner, _Sine())
    model.blocks[number].get_submodule(place).register_forward_hook(lambda _, inputs, out: out.sin())
    assert_same(outputs(model), outputs(other))
    x, coords = slides(TILES)
    assert float((model(x, coords)[0] - encoder(3)(x, coords)[0]).detach().abs().max()) > 1e-3


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def test_a_hook_that_comes_after_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    runs = {one: torch.compile(one, dynamic=True, backend="eager") for one in (passes.embed, passes.read_out)}
    monkeypatch.setattr(passes, "compiled", lambda function: runs[function])
    model = encoder(2, compiled=True)
    x, coords = slides(TILES)
    with torch.no_grad():
        before = model(x, coords)
        hook = model.blocks[0].attention.register_forward_hook(lambda _, inputs, out: out.sin())
        model.compiled = False
        expected = model(x, coords)
        model.compiled = True
        assert_same(model(x, coords), expected)
        hook.remove()
        assert_same(model(x, coords), before)
        assert float((before[0] - expected[0]).abs().max()) > 1e-3
    torch._dynamo.reset()


def test_graphs_are_for_modules_without_python_of_others() -> None:
    model = encoder(2)
    assert passes._replays_all(model)
    hook = model.blocks[1].feed_forward.fc1.register_forward_hook(lambda *_: None)
    assert not passes._replays_all(model)
    hook.remove()
    assert passes._replays_all(model)
    model.blocks[0] = Around(model.blocks[0])
    assert not passes._replays_all(model)


def test_a_hook_of_all_modules_runs() -> None:
    model, (x, coords) = encoder(2), slides(TILES)
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x, coords)
    finally:
        hook.remove()
    assert {id(model.get_submodule(f"blocks.1.{place}".rstrip("."))) for place in PLACES} <= {id(one) for one in seen}


def test_weights_of_tiles_need_the_encoders_own_blocks() -> None:
    x, coords = slides(TILES)
    model = encoder(3)
    expected = model.attention_weights(x, coords)
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(0))
    model.blocks[2].register_forward_hook(lambda *_: calls.append(2))
    torch.testing.assert_close(model.attention_weights(x, coords), expected)
    assert calls == [0, 2]
    for change in (
        lambda model: model.blocks[1].attention.register_forward_hook(lambda *_: None),
        lambda model: model.blocks.__setitem__(1, Around(model.blocks[1])),
    ):
        changed = encoder(3)
        change(changed)
        with pytest.raises(ValueError, match=r"blocks\[1\]"):
            changed.attention_weights(x, coords)


def test_recompute_that_is_set_later_reaches_wrapped_blocks() -> None:
    model = encoder(2)
    inner = model.blocks[0]
    model.blocks[0] = Around(inner)
    for how in ("none", "block"):
        model.recompute = how
        assert model.recompute == inner.recompute == model.blocks[1].recompute == how
    with pytest.raises(ValueError, match="recompute='all'"):
        model.recompute = "all"  # type: ignore[assignment]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", ["ffn", "block"])
def test_blocks_that_are_sharded_one_by_one(recompute: str, one_rank: None) -> None:
    model = encoder(3, recompute=recompute, dropout=0.0, drop_path=0.0).train()
    expected, outs = gradients(model), outputs(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.blocks[0], FSDPModule)
    assert_same(outputs(model), outs)
    (out,) = model(*slides(TILES))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert_same([one.grad.full_tensor() for one in model.parameters()], expected)  # type: ignore[union-attr]
