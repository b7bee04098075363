"""What a GPU asks of the Triton backend besides numbers: graphs, no waiting, memory errors, sharded modules."""

from __future__ import annotations

import pytest
import torch
from calls import call_on
from torch import Tensor

import longnet
from longnet import dilated_attention
from longnet.attention.backends import select_backend
from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
PATTERN = ((512, 1024), (1, 2))


def tensors(length: int = 1500, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (1, length, 4, 64)
    drawn = (torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    return [x.transpose(1, 2) for x in drawn]


def step(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    out = dilated_attention(q, k, v, *PATTERN, is_causal=True)
    return out, *torch.autograd.grad(out, (q, k, v), upstream)


def test_it_is_what_a_gpu_gets():
    for has_bias in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert select_backend("auto", call_on("cuda", dtype, has_bias)).name == "triton"


def test_a_captured_graph_replays_as_eager():
    static = [x.requires_grad_() for x in tensors()[:3]]
    upstream = tensors()[3]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*static, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static, upstream)
    for seed in (1, 2):
        fresh = tensors(seed=seed)
        with torch.no_grad():
            for kept, x in zip((*static, upstream), fresh, strict=True):
                kept.copy_(x)
        graph.replay()
        expected = step(*(x.requires_grad_() for x in fresh[:3]), fresh[3])
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device():
    q, k, v, upstream = tensors()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    bias = torch.randn(4, 2047, device=DEVICE, requires_grad=True)
    mask = torch.rand(1, 1500, device=DEVICE) < 0.2

    def call() -> None:
        step(*inputs, upstream)
        out, lse = pattern_attention(
            *inputs, Pattern.parse(*PATTERN), key_padding_mask=mask, distance_bias=bias, scale=-0.1, return_lse=True
        )  # fmt: skip
        torch.autograd.grad((out, lse), (*inputs, bias), (upstream, torch.zeros_like(lse)))

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [48, 64, 128])
def test_queries_of_padding_never_matter_where_no_gradient_flows(dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    """With a padding mask, and a relative bias where channels are 64: the same bits, whatever padded queries are."""
    length = 1500
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn = [torch.randn(2, 4, length, dim, generator=generator, device=DEVICE).to(dtype) for _ in range(4)]
    mask = torch.arange(length, device=DEVICE) >= torch.tensor([[1100], [1500]], device=DEVICE)
    mask[1, ::7] = True
    rows = mask[:, None, :, None]
    bias = torch.randn(4, 2047, generator=generator, device=DEVICE, requires_grad=True) if dim == 64 else None
    results = []
    for fill in (1.0, torch.nan, torch.inf):
        inputs = [x.detach().requires_grad_() for x in (drawn[0].masked_fill(rows, fill), *drawn[1:3])]
        out, lse = pattern_attention(
            *inputs, Pattern.parse(*PATTERN), is_causal=is_causal, key_padding_mask=mask, distance_bias=bias, return_lse=True,
            backend="triton",
        )  # fmt: skip
        upstream = (
            drawn[3].masked_fill(rows, 0.0),
            drawn[3][..., 0].masked_fill(mask[:, None] | lse.isinf(), 0.0).float(),
        )
        results.append(torch.autograd.grad((out, lse), [*inputs, *([] if bias is None else [bias])], upstream))
    for finite, *others in zip(*results, strict=True):
        assert finite.isfinite().all() and finite.any()
        assert all(torch.equal(other, finite) for other in others)
    assert not results[1][0].transpose(1, 2)[mask].any()


def test_out_of_memory_is_torchs_own_error_and_leaves_the_process_usable():
    q, k, v, upstream = tensors()
    expected = step(*(x.requires_grad_() for x in (q, k, v)), upstream)
    large = torch.zeros(1, 16, 1 << 18, 64, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            dilated_attention(large, large, large, *PATTERN)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for got, want in zip(step(q, k, v, upstream), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_module_with_a_relative_bias_trains_as_in_float64(is_causal):
    torch.manual_seed(0)
    options = dict(causal=is_causal, use_xpos=True, use_rel_pos_bias=True, qk_norm=True, kv_heads=2, device=DEVICE)
    module = longnet.DilatedAttention(256, 4, (1, 2), (512, 1024), backend="triton", **options)
    exact = longnet.DilatedAttention(256, 4, (1, 2), (512, 1024), backend="portable", dtype=torch.float64, **options)
    exact.load_state_dict(module.state_dict())
    x, upstream = (torch.randn(2, 1100, 256, device=DEVICE) for _ in range(2))
    mask = torch.arange(1100, device=DEVICE) >= torch.tensor([[1100], [900]], device=DEVICE)
    results = []
    for attention, dtype in ((module, torch.float32), (exact, torch.float64)):
        out = attention(x.to(dtype), mask)
        results.append((out, *torch.autograd.grad(out, tuple(attention.parameters()), upstream.to(dtype))))
    for got, want in zip(*results, strict=True):
        # The projections are float32 too. One that cannot matter (k's bias, under a softmax) has a gradient of noise.
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-3


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's advice to users of float32 products
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_with_gradients(backend):
    *inputs, upstream = tensors()
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(step_of_a_product, fullgraph=True, backend=backend)
    for got, want in zip(
        torch.autograd.grad(compiled(*inputs), inputs, upstream),
        torch.autograd.grad(step_of_a_product(*inputs), inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def step_of_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q * 2, k, v, *PATTERN, is_causal=True)


# Warnings of torch.distributed about its own defaults are not this project's.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fully_sharded_blocks_give_the_gradients_of_whole_ones():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    config = longnet.LongNetConfig.preset("nano")
    whole, sharded = (longnet.LongNetLM(config, device=DEVICE) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    tokens = torch.randint(0, 256, (2, 301), device=DEVICE)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=torch.device(DEVICE, 0)
    )
    try:
        for block in sharded.blocks:
            fully_shard(block)
        losses = []
        for model in (whole, sharded):
            losses.append(model.loss(tokens[:, :-1], tokens[:, 1:]))
            losses[-1].backward()
        assert torch.equal(*losses)
        for got, want in zip(sharded.parameters(), whole.parameters(), strict=True):
            grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
            torch.testing.assert_close(grad, want.grad)
    finally:
        torch.distributed.destroy_process_group()
