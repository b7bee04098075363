"""Time against the same-FLOP kernel, and beside dense attention and other implementations."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

from benchmarks.cases import PASSES, Case, Sizes, draw
from benchmarks.checks import Check, allowed_at_size, compare, rows_at_size, window_at_size
from benchmarks.contenders import Contender, dense, ours, same_flop
from benchmarks.peers import Peer
from benchmarks.timing import interleave


def speed(case: Case, peers: list[Peer], sizes: Sizes) -> dict[str, Any]:
    """Seconds of every repetition of one case. The judged pair runs alone; what is beside it has a round of its own.

    Raises:
        CheckFailed: before anything is timed, see :mod:`benchmarks.checks`.
    """
    tensors = draw(case)
    base, contender = same_flop(case), ours(case, tensors)
    tokens_first = ours(case, tensors.tokens_first(), "ours_tokens_first")
    checks = _gate(case, contender, tokens_first)
    others = [tokens_first, dense(case, tensors), *(peer.make(case, tensors.rows()) for peer in peers if peer.make)]
    passes = {}
    for which in PASSES:
        judged = _interleave([base, contender], which, sizes)
        expected = statistics.median(judged["ours"]) * float(case.dense_ratio)
        left_out = {}
        if expected > sizes.slow_seconds[0]:
            left_out["dense"] = f"about {expected:.0f} s a call expected"
        beside = _interleave([base, *(other for other in others if other.name not in left_out)], which, sizes)
        passes[which] = {"judged": judged, "beside": beside, "left_out": left_out}
    return {
        "case": case.to_dict(),
        "flop_ratio": float(case.flop_ratio),
        "checks": [asdict(check) for check in checks],
        "passes": passes,
    }


def noise(case: Case, sizes: Sizes) -> dict[str, Any]:
    """The same call as two contenders: what a ratio of 1 looks like on this machine today."""
    tensors = draw(case)
    first, second = ours(case, tensors, "first"), ours(case, tensors, "second")
    (out,) = first.passes["forward"]()
    checks = rows_at_size(case, tensors, out, allowed_at_size(case, tensors)[0])
    repetitions = sizes.noise_repetitions
    fixed = replace(sizes, repetitions=(repetitions, repetitions))
    return {
        "case": case.to_dict(),
        "checks": [asdict(check) for check in checks],
        "seconds": _interleave([first, second], "forward", fixed),
    }


def _gate(case: Case, contender: Contender, tokens_first: Contender) -> list[Check]:
    tensors = draw(case)
    allowed = allowed_at_size(case, tensors)
    got = contender.passes["forward_backward"]()
    found = rows_at_size(case, tensors, got[0], allowed[0])
    found += window_at_size(case, tensors, got, allowed)
    # The other pass and the other memory layout must give what has just been checked.
    found += compare(f"forward alone, {case}", contender.passes["forward"](), got, allowed)
    found += compare(f"(B, N, H, D) memory, {case}", tokens_first.passes["forward_backward"](), got, allowed)
    return found


def _interleave(contenders: list[Contender], which: str, sizes: Sizes) -> dict[str, list[float]]:
    functions = {contender.name: contender.passes[which] for contender in contenders}
    return interleave(functions, *sizes.repetitions, sizes.budget_seconds)
