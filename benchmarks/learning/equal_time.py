"""Stacks of layers that learn for the same time on one device, with longnet's kernels and the step of ``longnet train``.

    python -m benchmarks.learning.equal_time --out results --context 32768 --minutes 4
    python -m benchmarks.learning.equal_time --out results --context 32768 --stacks light --convert results/runs/dense-0

A stack's steps are first timed, a few after the compiler is done: as many as fit into the minutes are the run, whose schedule
of learning rates they end. So a run that was stopped goes on exactly where it was, and compiling costs nothing. Further seeds
in the same folder of results have as many steps. Dense layers use the kernels of longnet or of cuDNN, whichever train faster.
A result is one JSON, beside a folder of runs; what is there is not made again. ``--read`` scores the models at other lengths
than they were trained at.

``--convert`` begins with the weights of a run and trains for shares of its tokens, at lower learning rates; a share of 0 scores
the converted model as it is. ``--plain`` leaves out shifted keys and keeps positions in far layers, as the run had them.
``--keep 2`` gives windows to all layers of a dense run except the two whose windows raise the loss most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import results
from benchmarks.learning import keep, kinds, probes
from benchmarks.learning.data import Text, read_text, windows
from longnet import LongNetConfig, LongNetLM
from longnet.attention import module as attention_module
from longnet.geometry import Pattern, score_pairs
from longnet.models.layer_types import pattern_of
from longnet.models.stacks import STACKS as LIBRARY
from longnet.training import Corpus, TrainSettings, load_model, train

# How far back copied passages and names stand.
DISTANCES = (1024, 4096, 16384, 65536)
FAR = {"shift_keys": True, "far_positions": False}
# Of a step: fewer would keep the host busy in place of the GPU.
STEP_BYTES = 131_072
# Bytes of held-out text that are scored at one length, at most.
MOST_SCORED = 2**21
# Steps that are timed, and those before them that compile.
TIMED, BEFORE = 10, 3


def of_library(stack: str, layers: int) -> dict[str, Any]:
    """A stack of the library's presets."""
    return dict(LIBRARY[stack](layers, 512))


def types(layers: int, far: Mapping[int, str]) -> dict[str, Any]:
    """Windows, and what ``far`` names at its places."""
    return {"layer_types": tuple(far.get(place, "sliding_attention") for place in range(layers))}


def middle(layers: int) -> tuple[int, int]:
    """The two layers in the middle."""
    return layers // 2 - 1, layers // 2


# What a stack changes in the model of (layers, context). Dense attention with the tricks has windows as long as the context.
STACKS: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "dense": lambda layers, context: {"layer_types": ("full_attention",)},
    "dense, both tricks": lambda layers, context: {
        **types(layers, dict.fromkeys(middle(layers), "full_attention")),
        **FAR,
        "sliding_window": context,
    },
    "window": lambda layers, context: types(layers, {}),
    "window+dense 1/2": lambda layers, context: (
        types(layers, dict.fromkeys(range(1, layers, 2), "full_attention")) | FAR
    ),
    "window+dense 1/4": lambda layers, context: (
        types(layers, dict.fromkeys(range(3, layers, 4), "full_attention")) | FAR
    ),
    "window+dense 1/4 middle": lambda layers, context: (
        types(layers, dict.fromkeys(middle(layers), "full_attention")) | FAR
    ),
    "longnet": lambda layers, context: {
        "segment_lengths": tuple(min(2048, context // 16) * 2**i for i in range(5)),
        "dilation_rates": (1, 2, 4, 6, 12),
    },
    "balanced": lambda layers, context: of_library("balanced", layers),
    "light": lambda layers, context: of_library("light", layers),
}


def model_of(
    stack: str, context: int, layers: int = 8, dim: int = 512, heads: int = 8, plain: bool = False
) -> LongNetConfig:
    """The model of a stack; ``plain``: without shifted keys and with positions in layers that read far."""
    more = {name: value for name, value in STACKS[stack](layers, context).items() if not (plain and name in FAR)}
    return LongNetConfig(dim=dim, heads=heads, layers=layers, norm="rms", bias=False, qk_norm=True, **more)


@dataclass(frozen=True)
class Plan:
    """One run.

    Args:
        share: of the converted run's tokens; None to begin with random weights, for ``minutes``.
        rate: of the peak learning rates of a run that begins with random weights.
    """

    stack: str
    seed: int
    context: int
    minutes: float | None
    model: LongNetConfig
    batch: int
    convert: Path | None = None
    share: float | None = None
    rate: float = 1.0
    held_out: int = 48
    reads: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        origin = "" if self.convert is None else f"-from-{self.convert.name}-{self.share}-at-{self.rate}"
        return f"{kinds.file_name(self.stack)}{origin}-{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """What a later call has to ask for too."""
        return {
            "stack": self.stack, "seed": self.seed, "context": self.context, "batch": self.batch, "minutes": self.minutes,
            "converted": None if self.convert is None else self.convert.name, "share": self.share,
            "rate": None if self.convert is None else self.rate, "model": self.model.to_dict(), "held_out": self.held_out,
            "reads": self.reads,
        }  # fmt: skip

    def settings(self, out: Path, steps: int, **changes: Any) -> TrainSettings:
        on_gpu = torch.cuda.is_available()
        values: dict[str, Any] = {
            "out": str(out), "model": self.model, "context": self.context, "steps": steps, "batch": self.batch,
            "optimizer": "muon", "lr": 3e-3 * self.rate, "matrix_lr": 1e-2 * self.rate, "weight_decay": 0.0,
            "warmup": min(100, max(1, steps // 10)), "schedule": "wsd" if self.convert is None else "linear",
            "seed": self.seed, "eval_every": 0, "save_every": max(1, steps // 5),
            "dtype": "bfloat16" if on_gpu else "float32",
            "init_from": None if self.convert is None else str(self.convert),
        }  # fmt: skip
        return TrainSettings(**values | changes)


def corpus_of(text: Text) -> Corpus:
    """The harness's split as the library takes it."""
    digest = hashlib.sha256(text.train.tobytes() + text.held_out.tobytes()).hexdigest()
    return Corpus(
        "installed packages", text.train, text.held_out, text.facts["train_files"], text.facts["held_out_files"],
        text.train.size, text.held_out.size, "by a hash of a file's content", digest,
    )  # fmt: skip


@contextmanager
def dense_by_cudnn() -> Iterator[None]:
    """Layers that read everything call cuDNN's attention in place of longnet's kernels."""
    ours = attention_module.pattern_attention  # type: ignore[attr-defined]

    def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, **options: Any) -> Any:
        covers = len(pattern.branches) == 0 and pattern.window is not None and pattern.window >= query.shape[2]
        if covers or pattern == pattern_of("full_attention", 1, 1, 1):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return ours(query, key, value, pattern, **options)

    attention_module.pattern_attention = attend  # type: ignore[attr-defined]
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield
    finally:
        attention_module.pattern_attention = ours  # type: ignore[attr-defined]


DENSE_BY: Mapping[str, Callable[[], AbstractContextManager[None]]] = {"longnet": nullcontext, "cuDNN": dense_by_cudnn}


def seconds_a_step(plan: Plan, corpus: Corpus, dense_by: str) -> float:
    """Median of a few steps, those that compile apart."""
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder, DENSE_BY[dense_by]():
        settings = plan.settings(Path(folder) / "timed", BEFORE + TIMED, save_every=0)
        train(settings, corpus=corpus, callbacks=[lambda line: marks.append(time.perf_counter())])
    return median(after - before for before, after in zip(marks[BEFORE - 1 :], marks[BEFORE:], strict=False))


def begin(plan: Plan, corpus: Corpus, runs: Path) -> dict[str, Any]:
    """How many steps the run has, whose kernels dense layers use, and the seconds of a step where they were timed.

    As of another seed in the folder ``runs``, if one was begun.
    """
    if plan.convert is not None:
        assert plan.share is not None
        whole = json.loads((plan.convert / "run.json").read_text())["settings"]
        tokens = whole["steps"] * whole["batch"] * whole["context"]
        steps = round(plan.share * tokens / (plan.batch * plan.context))
        return {"steps": steps, "seconds_a_step": {}, "dense_by": "longnet"}
    assert plan.minutes is not None
    # As JSON gives it back: tuples are lists.
    wanted = json.loads(json.dumps(plan.to_dict()))
    for file in sorted(runs.glob("*.begun.json")):
        begun = json.loads(file.read_text())
        if all(begun.get(name) == value for name, value in wanted.items() if name != "seed"):
            return {name: begun[name] for name in ("steps", "seconds_a_step", "dense_by")}
    is_dense = "full_attention" in (plan.model.layer_types or ()) or plan.model.sliding_window >= plan.context
    has_choice = torch.cuda.is_available() and is_dense
    seconds = {one: seconds_a_step(plan, corpus, one) for one in DENSE_BY if has_choice or one == "longnet"}
    fastest = min(seconds, key=seconds.__getitem__)
    return {"steps": max(1, int(60 * plan.minutes / seconds[fastest])), "seconds_a_step": seconds, "dense_by": fastest}


def scores(
    model: LongNetLM, text: Text, context: int, held_out: int, batch: int, device: torch.device
) -> dict[str, Any]:
    """Every probe at a length."""
    score = lambda rows: probes.bits_of(model, rows, device, batch)  # noqa: E731
    fixed = windows(text.held_out, min(held_out, max(4, MOST_SCORED // context)), context + 1, 1)
    passages = max(4, min(32, 2**20 // context))
    return probes.all_probes(score, text.held_out, fixed, context, DISTANCES, passages)


def run(plan: Plan, out: Path, text: Text, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Train, or go on, and score.

    Returns:
        what a result file holds; None where the run was stopped before its end.

    Raises:
        ValueError: a run of this name that was begun with other options.
    """
    corpus, folder = corpus_of(text), out / "runs" / plan.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    head = results.started(kind="equal time", device=card)
    file = out / "runs" / f"{plan.name}.begun.json"
    if file.exists():
        begun = json.loads(file.read_text())
        check_same(plan, begun, file)
    else:
        begun = plan.to_dict() | begin(plan, corpus, file.parent)
        results.save(begun, file)
    steps = begun["steps"]
    print(f"{plan.name}: {steps:,} steps of {plan.batch} x {plan.context:,}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if steps:
        resume = (folder / "run.json").exists()
        with DENSE_BY[begun["dense_by"]]():
            summary = train(plan.settings(folder, steps), resume=resume, corpus=corpus, should_stop=should_stop)
        if not summary.finished:
            return None
        trained = {"seconds": summary.seconds, "tokens": summary.tokens, "curve": _curve(folder / "metrics.jsonl")}
        model = load_model(folder, device)
    else:
        assert plan.convert is not None
        trained = {"seconds": 0.0, "tokens": 0, "curve": []}
        model = LongNetLM(plan.model, device=device)
        model.load_state_dict(load_model(plan.convert, device).state_dict())
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    heads, layers, lengths = plan.model.heads, plan.model.layer_attentions(), sorted({plan.context, *plan.reads})
    pairs = sum(score_pairs(one.pattern, heads, plan.context, True) for one in layers)
    dense = len(layers) * heads * plan.context * (plan.context + 1) / 2
    return {
        **head, **begun, **trained, "peak_bytes": memory,
        "parameters": sum(x.numel() for x in model.parameters()), "cost": pairs / dense,
        "at": {str(one): scores(model, text, one, plan.held_out, max(1, min(16, 2**17 // one)), device) for one in lengths},
        "data": text.facts,
    }  # fmt: skip


def check_same(plan: Plan, record: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where ``record``, of a run or a result, is of other options than the plan."""
    # As JSON gives it back: tuples are lists.
    wanted = json.loads(json.dumps(plan.to_dict()))
    # What older results do not say is not compared.
    if others := [name for name, value in wanted.items() if name in record and record[name] != value]:
        differ = ", ".join(f"{name} was {record.get(name)!r}, now {wanted[name]!r}" for name in others)
        raise ValueError(f"{file} is of other options: {differ}. Expected the same, or another --out")


def _curve(metrics: Path, points: int = 200) -> list[list[float]]:
    """(step, seconds in the loop, bits of the step's bytes), about ``points`` of them."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [[one["step"], one["seconds"], one["bits_per_byte"]] for one in lines if one["kind"] == "train"]
    return found[:: max(1, len(found) // points)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.equal_time", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results: what it holds is not run again")
    parser.add_argument("--stacks", type=stack_names, help="names, by semicolons; all by default")
    parser.add_argument("--seeds", type=kinds.seeds, default=[0], help="by commas")
    parser.add_argument("--context", type=kinds.count, default=8192)
    parser.add_argument("--batch", type=kinds.count, help="windows a step; by default 131,072 bytes")
    parser.add_argument("--minutes", type=kinds.above, default=4.0, help="of training, for each stack")
    parser.add_argument("--layers", type=kinds.count, default=8)
    parser.add_argument("--dim", type=kinds.count, default=512)
    parser.add_argument("--heads", type=kinds.count, default=8)
    parser.add_argument("--held-out", type=kinds.count, default=48, help="windows that are scored")
    parser.add_argument("--read", type=kinds.count, nargs="*", default=[], help="other lengths to score the models at")
    parser.add_argument("--convert", type=kinds.run, help="the folder of a run of this program to begin with")
    parser.add_argument("--shares", type=numbers, help="of the run's tokens, by commas; 0,0.02,0.05,0.1 by default")
    parser.add_argument("--rate", type=kinds.above, help="of the learning rates, for a converted run; 0.3 by default")
    parser.add_argument("--plain", action="store_true", help="far layers with positions, and keys as they are")
    parser.add_argument(
        "--keep", type=kinds.count, nargs="+", help="full layers to leave in a dense run; replaces --stacks"
    )
    parser.add_argument("--stop-after", type=kinds.above, help="minutes; then the run is saved, for a later call")
    parser.add_argument(
        "--data", type=kinds.existing, action="append", help="folders of text; installed packages by default"
    )
    options = parser.parse_args()
    end = math.inf if options.stop_after is None else time.monotonic() + 60 * options.stop_after
    should_stop = lambda: time.monotonic() > end  # noqa: E731
    text = read_text(options.data or [Path(sysconfig.get_paths()["purelib"])])
    longest = max((options.context, *options.read))
    if longest >= text.held_out.size:
        parser.error(
            f"--context or --read {longest}: expected less than the held-out text has, {text.held_out.size:,} bytes"
        )
    origins: list[dict[str, Any]] = [{"minutes": options.minutes}]
    if options.convert is None and (options.shares or options.rate or options.keep):
        parser.error("--shares, --rate and --keep are of a converted run: expected --convert as well")
    if options.keep and (options.stacks is not None or options.plain):
        parser.error("--keep keeps a run's layers as they are: expected neither --stacks nor --plain beside it")
    if options.convert is not None:
        shares, rate = options.shares or [0.0, 0.02, 0.05, 0.1], options.rate or 0.3
        origins = [{"minutes": None, "convert": options.convert, "share": one, "rate": rate} for one in shares]
    batch = options.batch or max(1, STEP_BYTES // options.context)
    try:
        models = list(models_of(options, text))
    except ValueError as error:
        parser.error(str(error))
    scored = {"held_out": options.held_out, "reads": tuple(options.read)}
    for seed, (name, model), origin in product(options.seeds, models, origins):
        try:
            plan = Plan(name, seed, options.context, model=model, batch=batch, **scored, **origin)
            path = options.out / f"{plan.name}.json"
            if path.exists():
                check_same(plan, results.load(path), path)
                print(f"{path} is there")
                continue
            result = run(plan, options.out, text, should_stop)
        except ValueError as error:
            parser.error(str(error))
        if result is None:
            print(f"{plan.name} was stopped: the same command goes on")
            return
        results.save(result, path)
        bits = result["at"][str(options.context)]["bits"]
        print(f"{plan.name}: {bits:.4f} bits, cost {result['cost']:.3f}, written to {path}", flush=True)


def models_of(options: argparse.Namespace, text: Text) -> Iterator[tuple[str, LongNetConfig]]:
    """Name and model of each stack that the options ask for, or of each conversion that keeps full layers of a dense run.

    Raises:
        ValueError: sizes that make no model; a run that is not dense.
    """
    if options.keep:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = windows(text.train, 16, options.context + 1, 2)
        chosen = keep.converted_models(options.convert, rows, device, max(1, min(16, 2**17 // options.context)))
        for count in options.keep:
            if count not in chosen:
                raise ValueError(f"--keep {count}: expected from 1 to {max(chosen)}, fewer than the run's layers")
            yield f"window+dense {count}/{max(chosen) + 1} kept", chosen[count]
        return
    for stack in options.stacks or STACKS:
        sizes = options.layers, options.dim, options.heads, options.plain
        yield f"{stack}, plain" if options.plain else stack, model_of(stack, options.context, *sizes)


def numbers(text: str) -> list[float]:
    with suppress(ValueError):
        found = [float(part) for part in text.split(",")]
        if all(0 <= one <= 1 for one in found):
            return found
    raise argparse.ArgumentTypeError(f"{text}: expected numbers from 0 to 1 by commas, as in 0,0.05")


def stack_names(text: str) -> list[str]:
    stacks = [one.strip() for one in text.split(";")]
    if unknown := [one for one in stacks if one not in STACKS]:
        raise argparse.ArgumentTypeError(f"{unknown} are no stacks: expected some of {list(STACKS)}")
    return stacks


if __name__ == "__main__":
    main()
