"""The Triton backend, compiled, with the blocks it runs with: real tiles against the portable backend in float64.

That one is held to the oracle on the same device by ``test_cuda.py``. Few cases, because every one compiles its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from patterns import relative_error
from torch import Tensor

from longnet.attention.functional import pattern_attention
from longnet.geometry import Pattern

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]
DEVICE = "cuda"
NEST = ((512, 1), (1024, 2), (2048, 4), (4096, 8))
GIGAPATH = ((1024, 1), (5792, 2), (32768, 4))
UNEVEN = ((700, 3), (1900, 5), (3000, 7))


@dataclass(frozen=True)
class Case:
    branches: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    head_dim: int
    is_causal: bool
    batch: int = 1
    heads: int = 8
    group: int = 1
    length: int = 5003
    head_offsets: str = "interleaved"
    padding: float | None = None
    biased: bool = False
    scale: float | None = None

    def pattern(self) -> Pattern:
        return Pattern.parse([w for w, _ in self.branches], [r for _, r in self.branches], self.head_offsets)

    def inputs(self) -> list[Tensor]:
        """q, k, v in (B, N, H, D) memory, and the bias if there is one."""
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=self.dtype)

        kv_heads = self.heads // self.group
        rows = [
            draw(self.batch, self.length, heads, self.head_dim).transpose(1, 2)
            for heads in (self.heads, kv_heads, kv_heads)
        ]
        reach = min(self.length, max(w for w, _ in self.branches))
        return [x.requires_grad_() for x in (*rows, *([draw(self.heads, 2 * reach - 1)] if self.biased else []))]

    def mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        generator = torch.Generator(DEVICE).manual_seed(1)
        mask = torch.rand(self.batch, self.length, generator=generator, device=DEVICE) < self.padding
        mask[:, :70] = True  # so that the first rows of a causal sequence have no key at all
        return mask

    def upstream(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(2)
        shape = (self.batch, self.heads, self.length, self.head_dim)
        out = torch.randn(shape, generator=generator, device=DEVICE, dtype=self.dtype)
        return out, torch.randn(shape[:-1], generator=generator, device=DEVICE)


HALF, SHORT = torch.float16, torch.bfloat16
CASES = {
    "nest, causal, bfloat16": Case(NEST, SHORT, 64, True),
    "nest, grouped heads, padded, float16": Case(NEST, HALF, 64, False, batch=2, group=4, padding=0.2),
    "nest, head dimension 128, bfloat16": Case(NEST, SHORT, 128, True, length=4096),
    "nest, padded, float32": Case(NEST, torch.float32, 64, True, heads=4, padding=0.2),
    "nest of blocked offsets, float16": Case(((512, 1), (2048, 4)), HALF, 128, False, head_offsets="blocked"),
    "slides of tiles, head dimension 48, float16": Case(GIGAPATH, HALF, 48, False, heads=4, length=6001),
    "rows that no branch selects, bfloat16": Case(
        UNEVEN, SHORT, 128, True, heads=4, batch=2, head_offsets="blocked", padding=0.3, scale=-0.05
    ),
    "nothing nests, float32": Case(UNEVEN, torch.float32, 24, False, heads=4, group=2, length=3001),
    "head dimension 256, bfloat16": Case(NEST, SHORT, 256, True, heads=2, length=3001),
    "head dimension 16, float16": Case(((64, 1), (256, 2)), HALF, 16, True, length=300, batch=3),
    "relative bias, causal, bfloat16": Case(NEST, SHORT, 64, True, biased=True),
    "relative bias, padded, float16": Case(UNEVEN, HALF, 128, False, batch=2, heads=4, group=2, padding=0.2, biased=True),
    "relative bias, float32": Case(((512, 1), (1024, 2)), torch.float32, 64, False, heads=2, length=1500, biased=True),
}  # fmt: skip


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8, device=DEVICE).isnan().all(), "uninitialised memory is not poisoned"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(case: Case, inputs: list[Tensor], backend: str) -> list[Tensor]:
    """out, lse and the gradients of all inputs, with gradients flowing into both."""
    out, lse = pattern_attention(
        *inputs[:3], case.pattern(), is_causal=case.is_causal, scale=case.scale, key_padding_mask=case.mask(),
        distance_bias=inputs[3] if case.biased else None, return_lse=True, backend=backend,
    )  # fmt: skip
    grad_out, grad_lse = (x.to(like.dtype) for x, like in zip(case.upstream(), (out, lse), strict=True))
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse.masked_fill(lse.isinf(), 0.0)))]


def torchs_own_errors(case: Case) -> list[float]:
    """Of dense causal attention in the case's dtype, on 2048 rows: its output, and its gradients of q, k and v."""
    inputs = [x.detach()[:, :, :2048] for x in case.inputs()[:3]]
    grad_out = case.upstream()[0][:, :, :2048]
    results = []
    for dtype in (case.dtype, torch.float64):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(case.group, 1), v.repeat_interleave(case.group, 1), is_causal=True
        )
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad_out.to(dtype))))
    return [relative_error(got, expected) for got, expected in zip(*results, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name):
    case = CASES[name]
    inputs = case.inputs()
    with poisoned_memory():
        out, lse, *grads = attend(case, inputs, "triton")
    again = attend(case, inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip((out, lse, *grads), again, strict=True)), "two runs differ"
    del again
    expected_out, expected_lse, *expected = attend(
        case, [x.detach().double().requires_grad_() for x in inputs], "portable"
    )
    finite = ~expected_lse.isinf()
    assert torch.equal(lse.isfinite(), finite) and torch.equal(lse.isinf(), ~finite)
    assert [x.dtype for x in (out, *grads)] == [case.dtype] * (1 + len(inputs))
    if case.dtype == torch.float32:
        allowed = [1e-5, *[1e-4] * len(grads)]
    else:
        torchs = torchs_own_errors(case)
        # The bias's gradient sums score gradients as k's does.
        allowed = [2 * error for error in (*torchs, torchs[2])][: 1 + len(grads)]
    errors = [relative_error(x, want) for x, want in zip((out, *grads), (expected_out, *expected), strict=True)]
    assert all(error <= limit for error, limit in zip(errors, allowed, strict=True)), (errors, allowed)
    assert relative_error(lse[finite], expected_lse[finite]) < (1e-5 if case.dtype == torch.float32 else 1e-3)
    assert not out[~finite].any()


def test_what_comes_later_changes_no_bit():
    case = CASES["nest, causal, bfloat16"]
    before = [x.detach() for x in case.inputs()]
    for at in (1023, 3001):
        after = [x.clone() for x in before]
        for x in after:
            x[:, :, at + 1 :] = 100.0
        first, second = (
            pattern_attention(*x, case.pattern(), is_causal=True, backend="triton")[:, :, : at + 1]
            for x in (before, after)
        )
        assert torch.equal(first, second)


def test_what_padded_keys_hold_never_matters():
    case = CASES["nest, grouped heads, padded, float16"]
    q, k, v = case.inputs()
    mask = case.mask()
    clean = attend(case, [q, k, v], "triton")
    holes = mask[:, None, :, None].expand_as(k)
    poisoned = [x.detach().masked_fill(holes, torch.nan).requires_grad_() for x in (k, v)]
    for got, want in zip(attend(case, [q, *poisoned], "triton"), clean, strict=True):
        assert torch.equal(got, want)
    for grad in clean[3:]:
        assert not grad[holes].any()


@pytest.mark.parametrize("layout", ["heads first", "channels apart"])
def test_any_strides_give_the_same(layout):
    case = CASES["nest, causal, bfloat16"]
    inputs = case.inputs()
    expected = attend(case, inputs, "triton")
    if layout == "heads first":
        changed = [x.detach().contiguous() for x in inputs]
    else:
        changed = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    for got, want in zip(attend(case, [x.requires_grad_() for x in changed], "triton"), expected, strict=True):
        assert torch.equal(got, want)
