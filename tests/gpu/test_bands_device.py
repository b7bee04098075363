"""Windows, strides, blocks and offset grids on a GPU, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import dense_attention
from torch import Tensor

from longnet import dilated_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*to no head:UserWarning"),
]
KINDS: dict[str, dict[str, Any]] = {
    "window": {"segment_lengths": (), "dilation_rates": (), "window": 130},
    "window and stride": {"segment_lengths": (None,), "dilation_rates": (4,), "window": 96, "dilated_queries": False},
    "blocks": {
        "segment_lengths": (None,),
        "dilation_rates": (2,),
        "window": 64,
        "dilated_queries": False,
        "dilation_block": 32,
        "head_offsets": "grouped",
    },
    "segments": {"segment_lengths": (300, 700), "dilation_rates": (1, 3), "dilated_queries": False},
    "nest and window": {"segment_lengths": (128, 512), "dilation_rates": (1, 4), "window": 200},
    "rows in blocks": {"segment_lengths": (256, None), "dilation_rates": (2, 4), "dilation_block": 16},
    "another grid": {"segment_lengths": (128, 512), "dilation_rates": (1, 4), "segment_offset": 345},
    "a grid for each row": {"segment_lengths": (128, 512), "dilation_rates": (1, 4), "segment_offset": (-37, 600)},
}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(head_dim: int, dtype: torch.dtype, length: int = 777) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, head_dim) for heads in (4, 2, 2, 4)]
    *inputs, grad = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    return [x.requires_grad_() for x in inputs], grad


def is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def on_device(kind: dict[str, Any]) -> dict[str, Any]:
    """What the operation takes: offsets of rows as a tensor."""
    if not isinstance(offset := kind.get("segment_offset"), tuple):
        return kind
    return {**kind, "segment_offset": torch.tensor(offset, device="cuda")}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "padded"),
    [
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 128, False),
        (torch.float16, 48, False),
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 128, True),
        (torch.float16, 48, True),
        # The general kernels.
        (torch.float32, 64, True),
    ],
)
def test_it_is_the_definition(name: str, is_causal: bool, dtype: torch.dtype, head_dim: int, padded: bool) -> None:
    mask = torch.rand(2, 777, generator=torch.Generator().manual_seed(1)) < 0.2 if padded else None
    check(KINDS[name], is_causal, *draw(head_dim, dtype), mask)


@pytest.mark.parametrize("name", KINDS)
def test_the_general_kernels_are_the_definition_too(name: str) -> None:
    check(KINDS[name], True, *draw(64, torch.bfloat16), None, "triton:general")


@pytest.mark.parametrize("length", [1, 127, 128, 129, 2048])
@pytest.mark.parametrize("block", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("is_causal", [True, False])
def test_tiles_of_any_length_and_block(length: int, block: int, is_causal: bool) -> None:
    """What the Hopper kernels take: windows beside strided keys, on a grid that begins anywhere."""
    kind: dict[str, Any] = {
        "segment_lengths": (None,),
        "dilation_rates": (4,),
        "window": 200,
        "dilated_queries": False,
        "dilation_block": block,
        "segment_offset": 77,
    }
    check(kind, is_causal, *draw(64, torch.bfloat16, length), None)


@pytest.mark.parametrize("offset", [1000, 4097, -3, (1000, 8191)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("more", "dtype", "head_dim"),
    [
        ({}, torch.bfloat16, 64),
        ({}, torch.float16, 128),
        ({"window": 300}, torch.bfloat16, 64),
        ({"head_offsets": "blocked"}, torch.float16, 64),
    ],
    ids=["nest", "wide nest", "window", "blocked"],
)
def test_long_segments_on_another_grid(
    offset: int | tuple[int, int], is_causal: bool, more: dict[str, Any], dtype: torch.dtype, head_dim: int
) -> None:
    """What the Hopper kernels of nests take, on a grid that begins before token 0."""
    kind = {"segment_lengths": (1024, 2048, 8192), "dilation_rates": (1, 2, 4), "segment_offset": offset, **more}
    check(kind, is_causal, *draw(head_dim, dtype, 5000), None, "triton:hopper" if is_hopper() else "triton", "cuda")


def check(
    kind: dict[str, Any],
    is_causal: bool,
    inputs: list[Tensor],
    grad: Tensor,
    mask: Tensor | None,
    backend: str = "triton",
    oracle_on: str = "cpu",
) -> None:
    """Compare out, lse and gradients with the definition in float64."""
    options = {"is_causal": is_causal, **on_device(kind)}
    got, lse = dilated_attention(
        *inputs, **options, key_padding_mask=None if mask is None else mask.cuda(), return_lse=True, backend=backend
    )
    exact = [x.detach().double().to(oracle_on).requires_grad_() for x in inputs]
    offset = options.get("segment_offset", 0)
    options["segment_offset"] = offset.to(oracle_on) if isinstance(offset, Tensor) else offset
    with torch.device(oracle_on):
        want, want_lse = dense_attention(*exact, **options, key_padding_mask=mask)
    grads = torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, exact, grad.double().to(oracle_on))
    assert torch.equal(lse.to(oracle_on) == -torch.inf, want_lse == -torch.inf)
    allowed = ALLOWED[inputs[0].dtype]
    for one, other in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        # Of a single key gradients are 0 but for the rounding of sums.
        error, size = float((one.detach().double().to(oracle_on) - other.detach()).norm()), float(other.detach().norm())
        assert error <= allowed * max(size, 1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_offsets_of_rows_are_read_on_the_device() -> None:
    inputs, grad = draw(64, torch.bfloat16)
    kind = KINDS["another grid"] | {"is_causal": True}
    offsets = torch.tensor([3, -5], device="cuda")

    def step() -> tuple[Tensor, ...]:
        # Leaves of this stream: torch warns of gradients for leaves of another one.
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = dilated_attention(*leaves, **{**kind, "segment_offset": offsets})
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in ((3, -5), (100, 7)):
        offsets.copy_(torch.tensor(values))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


def test_two_runs_are_the_same_to_the_bit() -> None:
    inputs, grad = draw(64, torch.bfloat16)
    runs = []
    for _ in range(2):
        out = dilated_attention(*inputs, **KINDS["window and stride"], is_causal=True)
        runs.append((out, *torch.autograd.grad(out, inputs, grad)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_hopper_kernels_alone() -> None:
    if not is_hopper():
        pytest.skip("needs a Hopper GPU")
    check(KINDS["window and stride"], True, *draw(64, torch.bfloat16), None, "triton:hopper")


@pytest.mark.parametrize("name", ["window", "window and stride", "blocks", "nest and window"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("side", ["left", "right", "a row"])
def test_padding_in_hopper_kernels_alone(name: str, is_causal: bool, head_dim: int, side: str) -> None:
    """Whole tiles of padding, and tiles without; what padded keys and values hold never matters."""
    if not is_hopper():
        pytest.skip("needs a Hopper GPU")
    kind = KINDS[name] | ({"segment_lengths": (1024, 2048)} if name == "nest and window" else {})
    inputs, grad = draw(head_dim, torch.bfloat16, 2050)
    mask = torch.zeros(2, 2050, dtype=torch.bool)
    mask[1, {"left": slice(600), "right": slice(1500, None), "a row": slice(None)}[side]] = True
    check(kind, is_causal, inputs, grad, mask, "triton:hopper")
    options = {"is_causal": is_causal, **kind, "key_padding_mask": mask.cuda(), "backend": "triton:hopper"}
    runs = []
    for value in (1.0, torch.nan):
        query, *keys_values = (x.detach() for x in inputs)
        given = [query, *(x.masked_fill(mask.cuda()[:, None, :, None], value) for x in keys_values)]
        given = [x.requires_grad_() for x in given]
        out = dilated_attention(*given, **options)
        runs.append((out, *torch.autograd.grad(out, given, grad)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
