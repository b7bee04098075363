"""A trained model pruned and quantised: its size, its speed on the CPU, and what it loses on held-out text.

    python -m benchmarks.compress RUN --out compress.json      # RUN: the --out folder of longnet train

Every variant is written to a folder, read back, and has to give the logits that it gave before, bit for bit, or nothing is
measured. Times of all variants are taken in turn in one process. What a pruned model gains from training on is shown beside
what the whole model gains from as many steps.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks import report, results
from benchmarks.cases import Record
from benchmarks.checks import CheckFailed
from benchmarks.device import Cpu
from benchmarks.timing import interleave
from longnet import LongNetLM
from longnet.compress import SCHEMES, head_importance, least_important, prune_heads, quantize
from longnet.training import Corpus, load_model, read_corpus, save_model
from longnet.training.checkpoint import collect_weights
from longnet.training.data import draw_windows, is_prepared
from longnet.training.evaluate import score_windows, window_starts
from longnet.training.files import read_json
from longnet.training.folder import RunFolder
from longnet.training.resume import read_settings
from longnet.training.settings import TrainSettings

HEADS, WEIGHTS = 0.25, 0.30
# Share of the run's peak learning rate in recovery, and windows that importance is measured on.
RATE, WINDOWS = 0.1, 16
ROUNDS = 7
_SEED = 1 << 40  # of windows: none that the run drew


def variants(dense: LongNetLM, data: Corpus, settings: TrainSettings, steps: int) -> Iterator[tuple[str, LongNetLM]]:
    """(name, model), the model as it was trained first."""
    yield "as trained", dense
    names = {"int8wo": "int8 weights", "int8dyn": "int8 weights and activations", "float8wo": "float8 weights"}
    for scheme in SCHEMES:
        try:
            model = _quantized(dense, scheme)
        except ValueError as refused:
            print(f"{names[scheme]} left out: {refused}", flush=True)
        else:
            yield names[scheme], model
    batches = (_windows(data, settings, _SEED + i, 1) for i in range(WINDOWS))
    scores = head_importance(dense, [torch.cat((tokens, targets[:, -1:]), 1) for tokens, targets in batches])
    pruned = prune_heads(dense, least_important(dense, scores, HEADS))
    yield f"{HEADS:.0%} of heads pruned", pruned
    recovered = _trained_on(pruned, data, settings, steps)
    yield f"the same, {steps} steps later", recovered
    yield f"the same, {steps} steps later, int8 weights", _quantized(recovered, "int8wo")
    yield f"as trained, {steps} steps later", _trained_on(dense, data, settings, steps)
    yield f"{WEIGHTS:.0%} of weights pruned", _unstructured(dense)


def _quantized(model: LongNetLM, scheme: str) -> LongNetLM:
    model = copy.deepcopy(model)
    quantize(model, scheme)
    return model


def _unstructured(model: LongNetLM) -> LongNetLM:
    """The smallest weights of all blocks' linear layers set to zero."""
    model = copy.deepcopy(model)
    layers = [(module, "weight") for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=WEIGHTS)
    for module, name in layers:
        prune.remove(module, name)
    return model


def _trained_on(model: LongNetLM, data: Corpus, settings: TrainSettings, steps: int) -> LongNetLM:
    """A copy after a few steps more, at a constant low rate."""
    model = copy.deepcopy(model).train()
    betas = settings.beta1, settings.beta2
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr * RATE, betas, weight_decay=0.0)
    for step in range(steps):
        for _ in range(settings.accumulate):
            tokens, targets = _windows(data, settings, _SEED + WINDOWS + step, settings.batch)
            (model.loss(tokens, targets) / settings.accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _windows(data: Corpus, settings: TrainSettings, step: int, count: int) -> tuple[Tensor, Tensor]:
    return draw_windows(data.train, settings.context, count, settings.seed, step)


def saved_size(model: LongNetLM, tokens: Tensor) -> int:
    """Bytes of the model's file, once what is read back gives the same logits.

    Raises:
        CheckFailed: it does not.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model"
        save_model(model, path)
        if not torch.equal(load_model(path)(tokens), model(tokens)):
            raise CheckFailed("the model that was read back gives other logits")
        return RunFolder(path).model_file.stat().st_size


def decoding(model: LongNetLM, prompt: Tensor, count: int) -> Callable[[], object]:
    """``count`` tokens after a prompt that is read beforehand, the likeliest each."""
    with torch.inference_mode():
        cache = model.new_cache(1)
        first = model(prompt, cache=cache)[:, -1:].argmax(-1)

    def run() -> None:
        own, token = cache.clone(), first
        with torch.inference_mode():
            for _ in range(count):
                token = model(token, cache=own)[:, -1:].argmax(-1)

    return run


def forward(model: LongNetLM, tokens: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(tokens)

    return run


def measure(
    models: dict[str, LongNetLM], data: Corpus, settings: TrainSettings, held_out: int, decoded: int
) -> list[Record]:
    context = min(settings.context, data.held_out.size - 1)
    starts = window_starts(data.held_out.size, context, max(1, held_out // context))
    tokens = torch.from_numpy(data.held_out[:context].astype(np.int64)[None])
    records: list[Record] = []
    for name, model in models.items():
        bits = score_windows(model, data.held_out, context, starts, device=torch.device("cpu"))
        weights = collect_weights(model)
        record = {
            "name": name, "file_bytes": saved_size(model, tokens[:, :64]),
            "memory_bytes": sum(x.nbytes for x in weights.values()),
            "zeros": sum(int((x == 0).sum()) for key, x in weights.items() if key.endswith("weight")),
            "bits_per_byte": float(bits.mean(dtype=np.float64)) * data.tokens_per_byte,
            "scored_bytes": round(bits.size / data.tokens_per_byte),
        }  # fmt: skip
        records.append(record)
        print(f"{name}: {record['bits_per_byte']:.4f} bits per byte", flush=True)
    prompt = tokens[:, : max(1, context // 2)]
    forwards = {name: forward(model, tokens) for name, model in models.items()}
    decodes = {name: decoding(model, prompt, decoded) for name, model in models.items()}
    for what, functions in (("forward_seconds", forwards), ("decode_seconds", decodes)):
        for record, seconds in zip(records, interleave(Cpu(), functions, ROUNDS, ROUNDS).values(), strict=True):
            record[what] = seconds
    return records


def run(folder: Path, out: Path | None, *, data: str | None, steps: int, held_out: int, decoded: int) -> Record:
    """Measure and, with ``out``, write.

    Raises:
        ValueError: no run, or text that is not what it was trained on (where ``data`` does not name another).
    """
    settings = read_settings(RunFolder(folder))
    own = Path(folder) / "data"
    corpus = read_corpus(data or (own if is_prepared(own) else settings.data), print)
    trained_on = read_json(RunFolder(folder).settings_file)["data"]["fingerprint"]
    if data is None and corpus.fingerprint != trained_on:
        raise ValueError(f"data {corpus.source!r} is not what the run was trained on: expected --data")
    torch.manual_seed(0)
    models = {name: model.eval() for name, model in variants(load_model(folder), corpus, settings, steps)}
    result = results.started(
        kind="compress", device=Cpu().describe(), model=settings.model.to_dict(), context=settings.context,
        same_data=corpus.fingerprint == trained_on, recovery_steps=steps, decoded=decoded,
        variants=measure(models, corpus, settings, held_out, decoded),
    )  # fmt: skip
    result["versions"]["torchao"] = version("torchao")
    print("\n" + report.tables(result)[0].markdown())
    results.save(result, out)
    return result


def main() -> None:
    parser = results.program("compress", __doc__)
    parser.add_argument("run", type=Path, help="the --out folder of longnet train")
    parser.add_argument("--data", help="the text, where the run's own is elsewhere now")
    parser.add_argument("--steps", type=int, default=100, help="of recovery")
    parser.add_argument("--held-out", type=int, default=1 << 18, help="bytes to score")
    parser.add_argument("--decoded", type=int, default=64, help="tokens to generate at a time")
    options = parser.parse_args()
    sizes = {"steps": options.steps, "held_out": options.held_out, "decoded": options.decoded}
    run(options.run, options.out, data=options.data, **sizes)


if __name__ == "__main__":
    main()
