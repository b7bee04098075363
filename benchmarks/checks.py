"""The gate: results are compared with the float64 definition before anything is timed."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Tensors, draw
from longnet import dilated_attention

_ROWS = 256
_PIECE = 1 << 26
NAMES = ("out", "grad_query", "grad_key", "grad_value")
Attend = Callable[..., Tensor]


class CheckFailed(RuntimeError):
    """A result that is further from the definition than its dtype allows: there is nothing to time."""


@dataclass(frozen=True)
class Check:
    """A relative error in the Euclidean norm and what is allowed."""

    what: str
    error: float
    allowed: float

    def require(self) -> Check:
        # Written so that NaN fails too.
        if not self.error <= self.allowed:
            raise CheckFailed(f"{self.what}: relative error {self.error:.3g}, allowed {self.allowed:.3g}")
        return self


def require(what: str, errors: dict[str, float], allowed: float) -> dict[str, float]:
    """The errors, by name, once all of them are allowed. Raises :class:`CheckFailed`."""
    for name, error in errors.items():
        Check(f"{what}: {name}", error, allowed).require()
    return errors


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


@cache
def oracle() -> ModuleType:
    """The tests' dense float64 definition, by its path: the benchmark needs a checkout and has no copy of it."""
    path = Path(__file__).resolve().parents[1] / "tests" / "oracle.py"
    spec = importlib.util.spec_from_file_location("longnet_oracle", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the benchmark from a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64, in pieces: the float64 copies of a long sequence fit nowhere."""
    difference = size = 0.0
    pieces = (torch.split(x.detach().reshape(-1), _PIECE) for x in (got, expected))
    for one, other in zip(*pieces, strict=True):
        other = other.double()
        difference += float((one.double() - other).square().sum())
        size += float(other.square().sum())
    return math.sqrt(difference) / math.sqrt(size) if size else math.nan


def with_gradients(attend: Attend, tensors: Tensors) -> tuple[Tensor, ...]:
    """(out, grad_query, grad_key, grad_value)."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors.inputs)
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, tensors.grad_out.to(out.dtype)))


def allowed_errors(tensors: Tensors, is_causal: bool) -> tuple[float, float, float, float]:
    """What (out, grad_query, grad_key, grad_value) may be off by.

    float64: 1e-10. float32: 1e-5 and 1e-4 for gradients. Half precision: twice the error that torch's own attention
    makes on these inputs in their type, the rule of the FlashAttention test suite.
    """
    dtype = tensors.query.dtype
    if dtype == torch.float64:
        return (1e-10,) * 4
    if dtype == torch.float32:
        return (1e-5, 1e-4, 1e-4, 1e-4)

    attend = attend_dense(is_causal)
    pairs = zip(with_gradients(attend, tensors), with_gradients(attend, tensors.double()), strict=True)
    out, query, key, value = (2 * relative_error(got, expected) for got, expected in pairs)
    return out, query, key, value


def compare(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], allowed: Sequence[float]) -> list[Check]:
    """Checks of out and, where given, the three gradients. Raises :class:`CheckFailed` on the first that fails."""
    count = len(got)
    parts = zip(NAMES[:count], got, expected[:count], allowed[:count], strict=True)
    return [Check(f"{what}: {name}", relative_error(*pair), limit).require() for name, *pair, limit in parts]


def attend_dense(is_causal: bool) -> Attend:
    """``F.scaled_dot_product_attention`` over the whole sequence."""
    return partial(F.scaled_dot_product_attention, is_causal=is_causal)


def attend_dilated(case: Case, backend: str = "auto") -> Attend:
    """``dilated_attention`` with the case's pattern."""
    lists = {"segment_lengths": case.segment_lengths, "dilation_rates": case.dilation_rates}
    return partial(dilated_attention, **lists, is_causal=case.is_causal, backend=backend)


def small_against_oracle(small: Case, device: torch.device | str, backends: Sequence[str]) -> list[Check]:
    """out and gradients against the dense oracle.

    These backends in float64 (the portable one judges the others at full size), then what ``"auto"`` takes for the
    case's own dtype.
    """
    tensors = draw(small, seed=1, device=device)
    double = tensors.double()
    expected = with_gradients(lambda q, k, v: oracle_out(small, q, k, v), double)
    checks = []
    for backend in backends:
        what = f"oracle, N={small.length} float64, {backend}"
        got = with_gradients(attend_dilated(small, backend), double)
        checks += compare(what, got, expected, allowed_errors(double, small.is_causal))
    got = with_gradients(attend_dilated(small), tensors)
    return checks + compare(f"oracle, {small}", got, expected, allowed_errors(tensors, small.is_causal))


def oracle_out(case: Case, query: Tensor, key: Tensor, value: Tensor, head_offsets: str = "interleaved") -> Tensor:
    # The oracle knows nothing of devices: what it creates goes where its inputs are.
    with query.device:
        lists = (case.segment_lengths, case.dilation_rates)
        options = {"is_causal": case.is_causal, "head_offsets": head_offsets}
        out, _ = oracle().dense_attention(query, key, value, *lists, **options)
    assert isinstance(out, Tensor)
    return out


def allowed_at_size(case: Case, tensors: Tensors) -> tuple[float, float, float, float]:
    """:func:`allowed_errors` judged on one dense block of the case's own inputs."""
    # Copies: torch's own attention reads wild memory where heads lie more than 2**31 elements apart.
    return allowed_errors(tensors.map(lambda x: x[:, :4, : case.block].contiguous()), case.is_causal)


def rows_at_size(
    case: Case, tensors: Tensors, out: Tensor, allowed: float | None = None, first: int = 0
) -> list[Check]:
    """Random rows of ``out``, from ``first`` on, against the definition written out for one row at a time in float64."""
    chosen = random.Random(0)
    ranges = (range(case.batch), range(case.heads), range(first, case.length))
    picks = [tuple(chosen.choice(one) for one in ranges) for _ in range(_ROWS - 1)]
    picks.append((case.batch - 1, case.heads - 1, case.length - 1))
    expected = torch.stack([_row(case, tensors, *pick) for pick in picks])
    got = torch.stack([out[pick] for pick in picks])
    limit = allowed_at_size(case, tensors)[0] if allowed is None else allowed
    return compare(f"{_ROWS} rows, {case}", [got], [expected], [limit])


def _row(case: Case, tensors: Tensors, batch: int, head: int, position: int) -> Tensor:
    keys: list[int] = []
    for branch in case.pattern.branches:
        if case.pattern.selects(branch, head, case.heads, position):
            start = position - position % branch.segment_length
            first = start + case.pattern.offset(branch, head, case.heads)
            stop = position + 1 if case.is_causal else min(case.length, start + branch.segment_length)
            keys += range(first, stop, branch.dilation_rate)
    index = torch.tensor(keys, dtype=torch.int64, device=tensors.query.device)
    key, value = (x[batch, head].index_select(0, index).double() for x in (tensors.key, tensors.value))
    scores = key @ tensors.query[batch, head, position].double() * case.head_dim**-0.5
    out: Tensor = scores.softmax(0) @ value
    return out


def window_at_size(case: Case, tensors: Tensors, got: Sequence[Tensor], allowed: Sequence[float]) -> list[Check]:
    """out and gradients of one random window and group of heads against the portable backend in float64.

    A window is a whole period of the pattern: no key is read across its ends, so alone it must give the same. The
    group starts where head offsets repeat, so its heads have the offsets they have in the whole.
    """
    chosen = random.Random(0)
    period, heads = min(case.pattern.period, case.length), math.lcm(*case.dilation_rates)
    token, head = chosen.randrange(0, case.length, period), chosen.randrange(0, case.heads, heads)

    def part(x: Tensor) -> Tensor:
        return x[:, head : head + heads, token : token + period]

    window = tensors.map(part).double()
    expected = with_gradients(attend_dilated(case, "portable"), window)
    what = f"window at {token}, heads {head} to {min(case.heads, head + heads) - 1}, {case}"
    return compare(what, [part(x) for x in got], expected, allowed)
