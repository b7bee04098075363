"""The slide encoder replayed from CUDA graphs: the same results and gradients, and kept tensors outside of a graph's memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longnet.gigapath import SlideEncoder, passes
from longnet.runtime.cache import GraphSafeCache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's compiler has much to say of itself.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DEVICE = "cuda"
SIZES = (1100, 70, 2300, 640)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def slide(tiles: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(tiles)
    x = torch.randn(2, tiles, 48, generator=generator, device=DEVICE)
    return x, torch.randint(0, 250_000, (2, tiles, 2), generator=generator, device=DEVICE)


def encoder(**options) -> SlideEncoder:
    torch.manual_seed(0)
    return SlideEncoder(
        256,
        3,
        4,
        in_dim=48,
        dropout=0.0,
        drop_path=0.0,
        recompute="elementwise",
        compiled=True,
        device=DEVICE,
        **options,
    )


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_slides_of_many_sizes_again_and_again():
    model = encoder(cuda_graphs=True).eval()
    expected, found = {}, []
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        model.compiled = False
        for size in SIZES:
            expected[size] = model(*slide(size), all_layer_embed=True)
        model.compiled = True
        for _ in range(4):
            found += [(size, model(*slide(size), all_layer_embed=True)) for size in SIZES]
    # After all of them: no replay writes into the results of another.
    for size, states in found:
        for got, want in zip(states, expected[size], strict=True):
            assert apart(got, want) < 5e-3


def gradients(model: SlideEncoder, size: int) -> None:
    with torch.autocast(DEVICE, torch.float16):
        (out,) = model(*slide(size))
    towards = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
    (out * towards).sum().backward()


def test_training_adds_up_gradients_and_sees_new_weights():
    models = {graphs: encoder(cuda_graphs=graphs).train() for graphs in (False, True)}
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models.values()), strict=True))
    optimizers = {graphs: torch.optim.SGD(model.parameters(), lr=1e-3) for graphs, model in models.items()}
    for turn in range(5):
        for model in models.values():
            for size in SIZES[: 1 + turn % 3]:
                # Gradients of several slides add up before a step.
                gradients(model, size)
                gradients(model, size)
        for (name, got), want in zip(models[True].named_parameters(), models[False].parameters(), strict=True):
            assert got.grad is not None and want.grad is not None
            assert (got.grad - want.grad).norm() <= 2e-2 * want.grad.norm() + 1e-3, (turn, name)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(turn % 2))
    assert all(apart(a, b) < 1e-4 for a, b in zip(*(m.parameters() for m in models.values()), strict=True))


def test_two_slides_before_one_backward_pass():
    models = {graphs: encoder(cuda_graphs=graphs).train() for graphs in (False, True)}
    for turn in range(4):
        grads = {}
        for graphs, model in models.items():
            model.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                # Of two sizes, or of one.
                first, second = (model(*slide(size))[0] for size in (SIZES[0], SIZES[turn % 2]))
            (first * second).sum().backward()
            grads[graphs] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert apart(grads[True], grads[False]) < 2e-2


def test_parameters_that_another_pass_has_met():
    model = encoder(cuda_graphs=True).train()
    penalty = sum(p.square().sum() for p in model.parameters())
    with torch.autocast(DEVICE, torch.float16):
        out = model(*slide(640))[0]
    (out.float().square().sum() + 0.0 * penalty).backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model.cuda_graphs = False
    with torch.autocast(DEVICE, torch.float16):
        model(*slide(640))[0].float().square().sum().backward()
    assert apart(got, torch.cat([p.grad.flatten() for p in model.parameters()])) < 2e-2


def test_a_pass_without_a_backward_pass_does_not_wait_for_ever():
    model = encoder(cuda_graphs=True).train()
    with torch.autocast(DEVICE, torch.float16):
        model(*slide(640))
        out = model(*slide(640))[0]
    (captured,) = passes.REPLAYS._by_model[model].values()
    assert captured.waiting
    loss, some = out.float().square().sum(), [model.norm.weight]
    torch.autograd.grad(loss, some, retain_graph=True)
    assert not captured.waiting
    with pytest.raises(RuntimeError, match="ran twice"):
        torch.autograd.grad(loss, some)
    del out, loss
    with torch.autocast(DEVICE, torch.float16):
        model(*slide(640))
    assert not captured.waiting


def test_moved_weights_are_seen():
    model = encoder(cuda_graphs=True).eval()
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        first = model(*slide(640))[0]
        model.to("cpu")
        held = [torch.full((1 << 20,), torch.nan, device=DEVICE) for _ in range(32)]
        model.to(DEVICE)
        assert apart(model(*slide(640))[0], first) < 5e-3
        model.norm.bias.add_(1.0)
        assert apart(model(*slide(640))[0], first) > 1e-2
        del held


def test_dropout_of_every_replay_is_its_own():
    model = encoder(cuda_graphs=True).train()
    for block in model.blocks:
        block.dropout.p = 0.3
    with torch.autocast(DEVICE, torch.float16):
        found = [model(*slide(1100))[0].detach() for _ in range(6)]
    assert len({tuple(out.flatten().tolist()) for out in found}) == 6


def test_what_is_kept_lies_outside_of_a_graphs_memory():
    kept, pool = GraphSafeCache(2), torch.cuda.MemPool()
    make = lambda: torch.arange(1 << 20, device=DEVICE)  # noqa: E731
    with torch.cuda.use_mem_pool(pool):
        inside, found = make(), kept.get("one", torch.device(DEVICE, 0), make)
    segments = [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]
    in_pool = lambda x: any(a <= x.data_ptr() < b for a, b in segments)  # noqa: E731
    assert in_pool(inside) and not in_pool(found)
    assert kept.get("one", torch.device(DEVICE, 0), make) is found


def test_what_a_graph_reads_is_never_given_up():
    kept, device = GraphSafeCache(1), torch.device(DEVICE, 0)
    make = {key: lambda key=key: torch.full((1 << 20,), float(key), device=DEVICE) for key in range(4)}
    kept.get(0, device, make[0])
    out, graph = torch.zeros(1 << 20, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(kept.get(0, device, make[0]))
    for key in range(1, 4):
        kept.get(key, device, make[key])
    torch.empty(1 << 22, device=DEVICE).fill_(-1.0)
    graph.replay()
    assert bool((out == 0.0).all())


def test_a_tile_outside_of_the_grid_is_refused_and_forgotten():
    model = encoder(cuda_graphs=True).eval()
    x, coords = slide(300)
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        expected = model(x, coords)[0]
        for value in (-1, 256_000):
            wrong = coords.clone()
            wrong[1, 7, 0] = value
            with pytest.raises(ValueError, match=r"coords\[1, 7\]"):
                model(x, wrong)
        assert apart(model(x, coords)[0], expected) < 5e-3
