"""What is measured on a GPU, at which sizes, against which limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cases import PASSES, Case

SECTIONS = ("ceilings", "speed", "memory", "gigapath", "growth", "longest", "stream")
_LONG, _GIB = (131072, 1048576), 2**30

# "tax": time over the same-FLOP kernel's, at most. "dense": time over dense cuDNN attention's, at most. "torchscale":
# torchscale's time over ours, at least. "memory": bytes beyond q, k, v, at most. "growth": the largest time per token
# over the smallest, less 1, at most. "position": time of a token at the last position over the first, less 1, at most.
# "dense_decoding": time of a dense decoding step over ours, at least. A limit holds for the cells whose fields are all in
# its lists.
LIMITS: dict[str, Any] = {
    "speed": [
        {"kind": "tax", "length": _LONG, "head_dim": (64,), "pass": ("forward",), "limit": 1.00},
        {"kind": "tax", "length": _LONG, "head_dim": (128,), "pass": ("forward",), "limit": 1.05},
        {"kind": "tax", "length": (32768,), "head_dim": (64, 128), "pass": ("forward",), "limit": 1.10},
        {"kind": "tax", "length": _LONG, "head_dim": (64, 128), "pass": ("forward_backward",), "limit": 1.05},
        {"kind": "dense", "length": (8192,), "head_dim": (64,), "pass": ("forward_backward",), "limit": 1.00},
        *(
            {"kind": "torchscale", "is_causal": (True,), "length": lengths, "head_dim": dims, "pass": (which,)}
            | {"limit": limit}
            for lengths, dims, which, limit in (
                (_LONG, (64,), "forward", 5.5),
                (_LONG, (128,), "forward", 7.0),
                ((32768,), (64, 128), "forward", 6.0),
                (_LONG, (64,), "forward_backward", 3.8),
                (_LONG, (128,), "forward_backward", 4.5),
            )
        ),
    ],
    "memory": {"forward": 2.2 * _GIB, "forward_backward": 10.5 * _GIB},
    "gigapath": 3.0,
    "growth": 0.05,
    "stream": {"position": 0.05, "dense_decoding": 4.0},
}


@dataclass(frozen=True)
class StreamSizes:
    """Streams: (N, chunk, single tokens at the end), and how single tokens are timed."""

    rows: tuple[tuple[int, int, int], ...]
    positions: tuple[int, ...]
    dense_tokens: int
    layers: int
    rounds: int
    replays: int


@dataclass(frozen=True)
class GpuSizes:
    """What one run covers.

    Rounds are as many as fit into ``budget_seconds`` a cell, between the two numbers; with other implementations there
    are ``peer_rounds`` more. A curve ends where a call is expected to take longer than ``slow_seconds``.
    """

    base: Case
    oracle: tuple[Case, ...]
    speed: tuple[Case, ...]
    memory: tuple[Case, ...]
    gigapath: tuple[Case, ...]
    growth: tuple[Case, ...]
    curves: tuple[Case, ...]
    longest: Case
    longest_step: int
    longest_seconds: float
    stream: StreamSizes
    matrix: int
    copy_bytes: int
    rounds: tuple[int, int]
    budget_seconds: float
    peer_rounds: int
    slow_seconds: float
    judged: bool

    def of(self, sections: tuple[str, ...]) -> Iterator[Case]:
        """Every case of these sections and the small ones that are compared with the oracle."""
        yield from self.oracle
        for section in ("speed", "memory", "gigapath", "growth"):
            if section in sections:
                yield from getattr(self, section)
        if "growth" in sections:
            yield from self.curves
        if "longest" in sections:
            # Beyond 2**31 elements strides are wider integers, which are other kernels.
            yield self.longest
            yield replace(self.longest, length=2 * self.longest.length)


_BASE = Case(
    1048576,
    "bfloat16",
    heads=16,
    segment_lengths=(2048, 4096, 8192, 16384, 32768),
    dilation_rates=(1, 2, 4, 8, 16),
)
_GIGAPATH = Case(
    10001,
    "float16",
    heads=16,
    head_dim=48,
    segment_lengths=(1024, 5792, 32768, 185363, 1048576),
    dilation_rates=(1, 2, 4, 8, 16),
    is_causal=False,
)


def _grid(base: Case, lengths: tuple[int, ...], dims: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(
        replace(base, length=length, head_dim=dim, is_causal=is_causal)
        for length in lengths
        for dim in dims
        for is_causal in (True, False)
    )


# Half the segments keep enough rows for all branches to be one nest, and 2,500 tokens divide by none of them.
_ORACLE = replace(_BASE, length=2500, segment_lengths=tuple(w // 2 for w in _BASE.segment_lengths))

FULL = GpuSizes(
    base=_BASE,
    oracle=(*_grid(_ORACLE, (2500,), (64, 128)), replace(_GIGAPATH, length=2500)),
    speed=_grid(_BASE, (8192, 32768, 131072, 1048576), (64, 128)),
    memory=_grid(_BASE, (1048576,), (64,)),
    gigapath=(_GIGAPATH, replace(_GIGAPATH, length=45681)),
    # Eight heads, so that 16M tokens fit: the same heads at every length, or they would not be comparable.
    growth=tuple(replace(_BASE, length=2**i, heads=8) for i in range(17, 25)),
    curves=tuple(replace(_BASE, length=2**i) for i in range(13, 21)),
    longest=_BASE,
    longest_step=65536,
    longest_seconds=90.0,
    # 100,007,936 is the first multiple of the period past 100 million.
    stream=StreamSizes(
        rows=((1048576, 65536, 0), (262144, 65536, 128)),
        positions=(65536, 100007936),
        dense_tokens=65536,
        layers=8,
        rounds=16,
        replays=32,
    ),
    matrix=8192,
    copy_bytes=4 * _GIB,
    rounds=(5, 25),
    budget_seconds=1.5,
    peer_rounds=3,
    slow_seconds=1.5,
    judged=True,
)

_SMALL = Case(512, "bfloat16", heads=4, head_dim=64, segment_lengths=(128, 256), dilation_rates=(1, 2))

# Seconds of work that say nothing about speed: they show that the benchmark itself works.
QUICK = GpuSizes(
    base=_SMALL,
    oracle=(_SMALL,),
    speed=tuple(replace(_SMALL, length=length) for length in (128, 512)),
    memory=(_SMALL,),
    gigapath=(replace(_SMALL, length=301, head_dim=48, dtype="float16", is_causal=False),),
    growth=tuple(replace(_SMALL, length=length) for length in (512, 1024)),
    curves=tuple(replace(_SMALL, length=length) for length in (256, 512)),
    longest=_SMALL,
    longest_step=65536,
    longest_seconds=1.0,
    stream=StreamSizes(
        rows=((512, 100, 0), (300, 100, 5)), positions=(256, 2560), dense_tokens=64, layers=2, rounds=2, replays=3
    ),
    matrix=256,
    copy_bytes=2**20,
    rounds=(3, 3),
    budget_seconds=0.0,
    peer_rounds=2,
    slow_seconds=1.5,
    judged=False,
)


def only(sizes: GpuSizes, lengths: list[int] | None, dims: list[int] | None) -> GpuSizes:
    """The speed cells of these lengths and head dimensions.

    Raises:
        ValueError: there are none.
    """
    kept = tuple(
        case for case in sizes.speed if (not lengths or case.length in lengths) and (not dims or case.head_dim in dims)
    )
    if not kept:
        have = sorted({case.length for case in sizes.speed}), sorted({case.head_dim for case in sizes.speed})
        raise ValueError(
            f"length={lengths} and head_dim={dims} leave no cell: expected some of {have[0]} and {have[1]}"
        )
    return replace(sizes, speed=kept)


def place(case: dict[str, Any], which: str) -> str:
    """A cell in words."""
    causal = "causal" if case["is_causal"] else "not causal"
    return f"N={case['length']} H={case['heads']} D={case['head_dim']} {causal} {_NAMES[which]}"


_NAMES = dict(zip(PASSES, ("forward", "fwd+bwd"), strict=True))
