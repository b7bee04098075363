"""The report of a run: held-out bits per byte by position, baselines, figures and a sample, as JSON and one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longnet.figures.patterns import plot_layers
from longnet.geometry.reach import LayerAttention
from longnet.models import LongNetConfig
from longnet.training.baselines import Baselines, measure_baselines
from longnet.training.charts import plot_loss, plot_positions
from longnet.training.data import Corpus
from longnet.training.device import resolve_device
from longnet.training.evaluate import (
    CutContext,
    Estimate,
    PositionBin,
    compare_cut,
    cut_lengths,
    profile_positions,
    score_windows,
    window_starts,
)
from longnet.training.files import read_json, write_json, write_text
from longnet.training.folder import RunFolder, load_trained
from longnet.training.lock import locked
from longnet.training.metrics import RUN_LINES, read_metrics
from longnet.training.models import Config, Model
from longnet.training.page import Page
from longnet.training.progress import Reporter, SilentReporter, format_seconds, task
from longnet.training.resume import data_change, open_data, read_settings
from longnet.training.settings import TrainSettings

SCORED_BYTES = 1 << 20
"""Most held-out bytes to score and compress; from more of them, evenly spaced windows are taken."""
CUT_WINDOWS = 16
"""Windows that are scored again with their context cut: pairs vary little, so a few are enough."""
SAMPLE_PROMPT, SAMPLE_BYTES = 384, 512


@dataclass(frozen=True)
class Evaluation:
    """The held-out result of a run; bits per byte throughout.

    Attributes:
        bits_per_byte: over all scored bytes.
        context: tokens per window.
        windows: how many were scored.
        scored_bytes: of the scored tokens, at the mean bytes a token of the held-out text.
        positions: by tokens of context.
        cuts: the gain of the whole context over shorter ones, the shortest first; empty for windows too short to cut.
        baselines: of the same bytes.
        unit: what a token is called: "bytes", or "tokens".
    """

    bits_per_byte: Estimate
    context: int
    windows: int
    scored_bytes: int
    positions: list[PositionBin]
    cuts: list[CutContext]
    baselines: Baselines
    unit: str = "bytes"


def write_report(run: str | Path, *, corpus: Corpus | None = None, reporter: Reporter | None = None) -> Evaluation:
    """Evaluate the model of a run folder and write ``evaluation.json``, the PNGs and ``report.html`` into it.

    Args:
        run: the ``--out`` folder of a run that has saved a model.
        corpus: the run's data, if the caller has already read it.
        reporter: receives progress messages.

    Raises:
        ValueError: no finished model in the folder, or data that have changed since the run.
    """
    folder = RunFolder(run)
    folder.require_run()
    tell = reporter or SilentReporter()
    with locked(folder.path):
        settings = read_settings(folder)
        device = resolve_device(settings.device, settings.dtype)
        record = read_json(folder.settings_file)
        data = corpus or open_data(folder, settings, tell.say)
        if (change := data_change(folder, data)) is not None:
            raise ValueError(
                f"data {data.source!r} is not what the run in {str(folder.path)!r} was trained on: {change}. The model stays "
                f"in {folder.model_file}"
            )
        folder.require_metrics()
        metrics = read_metrics(folder.metrics_file, kinds=RUN_LINES)
        if not any(line["kind"] == "train" for line in metrics):
            raise ValueError(f"the run in {str(folder.path)!r} has done no step yet: expected one to report on")
        model = load_trained(folder.path, device)
        evaluation = evaluate_model(model, data, settings, device, tell)
        write_json(folder.evaluation_file, asdict(evaluation))
        tell.say("Drawing the figures")
        pictures = {name: folder.path / f"{name}.png" for name in ("loss", "positions")}
        plot_loss(metrics, evaluation.baselines, pictures["loss"], data.unit)
        plot_positions(evaluation.positions, evaluation.cuts, evaluation.baselines, pictures["positions"], data.unit)
        patterns = plot_layers(_kinds_of_layers(settings.model), settings.context, folder.path / "pattern.png")
        prompt, continuation = _sample(model, data, device, tell)
        record["parameters"] = sum(weight.numel() for weight in model.parameters())
        write_text(
            folder.report_file,
            _compose(record, settings, evaluation, metrics, pictures, patterns, prompt, continuation),
        )
        tell.say(f"Report: {folder.report_file}")
        return evaluation


def _kinds_of_layers(config: Config) -> dict[str, LayerAttention]:
    """Every type of layer of a model once, with all heads."""
    whole = config.replace(head_numbers=None) if isinstance(config, LongNetConfig) else config
    types, layers = config.layer_types or ("dilated_attention",), whole.layer_attentions()
    return {kind: layers[types.index(kind)] for kind in dict.fromkeys(types)}


def evaluate_model(
    model: Model, data: Corpus, settings: TrainSettings, device: torch.device, reporter: Reporter
) -> Evaluation:
    """Score the held-out bytes by position, some of them again with their context cut short, and measure baselines."""
    context = min(settings.context, data.held_out.size - 1)
    starts = window_starts(data.held_out.size, context, max(8, SCORED_BYTES // context))
    scored = np.concatenate([data.held_out[start + 1 : start + context + 1] for start in starts.tolist()])
    baselines = measure_baselines(data.train, scored, data.tokenizer, data.tokens_per_byte, reporter.say)

    def score(length: int, at: np.ndarray) -> np.ndarray:
        with task(reporter, f"Scoring {at.size * length:,} held-out {data.unit}, {length:,} of context"):
            return data.tokens_per_byte * score_windows(
                model,
                data.held_out,
                length,
                at,
                batch=settings.batch * max(1, context // length),
                device=device,
                dtype=getattr(torch, settings.dtype),
                on_progress=reporter.advance,
            )

    bits = score(context, starts)
    chosen = np.unique(np.linspace(0, starts.size - 1, min(CUT_WINDOWS, starts.size)).round().astype(np.int64))
    cuts = [compare_cut(bits[chosen], starts[chosen], length, score) for length in cut_lengths(context)]
    overall = Estimate.over_windows(bits.mean(axis=1, dtype=np.float64))
    size = round(scored.size / data.tokens_per_byte)
    positions = profile_positions(bits)
    return Evaluation(overall, context, int(starts.size), size, positions, cuts, baselines, data.unit)


def long_context_verdict(evaluation: Evaluation) -> str:
    """Whether the model uses the long context, in words made from the numbers."""
    verdict = _verdict(evaluation)
    if evaluation.unit == "bytes":
        return verdict
    return f"{verdict} A token is {evaluation.scored_bytes / (evaluation.windows * evaluation.context):.2f} bytes here."


def _verdict(evaluation: Evaluation) -> str:
    cuts, unit = evaluation.cuts, evaluation.unit
    if not cuts:
        return f"A context of {evaluation.context} {unit} is too short to tell whether the model uses a long one."
    if evaluation.bits_per_byte.mean >= evaluation.baselines.unigram:
        return (
            f"Too early to tell whether the model uses its long context: it has {evaluation.bits_per_byte.mean:.3f} bits a byte, "
            f"a unigram model {evaluation.baselines.unigram:.3f}."
        )
    longest = cuts[-1]
    if longest.gain.low is None:
        return f"Undecided, with one held-out window alone: {_compared(longest, unit)}."
    # A gain that is shown as +0.000 is none.
    helped = [number for number, cut in enumerate(cuts) if cut.gain.low is not None and round(cut.gain.low, 3) > 0]
    if not helped:
        return f"No, nothing is gained from more than {cuts[0].last:,} {unit} of context: {_compared(cuts[0], unit)}."
    last = helped[-1]
    if last == len(cuts) - 1:
        return f"Yes, the model uses its long context: {_compared(longest, unit)}."
    return (
        f"In part, the model uses up to about {cuts[last + 1].last:,} {unit} of its context: {_compared(cuts[last], unit)}; "
        f"it gains nothing from the {unit} farther away ({_saved(cuts[last + 1])} against {cuts[last + 1].last:,} {unit})."
    )


def _compared(cut: CutContext, unit: str) -> str:
    return (
        f"the same {unit} cost {cut.cut:.3f} bits a byte with {cut.first:,} to {cut.last:,} {unit} of context and "
        f"{cut.full:.3f} with {cut.full_first:,} to {cut.full_last:,} ({_saved(cut)})"
    )


def _saved(cut: CutContext) -> str:
    if cut.gain.low is None or cut.gain.high is None:
        return f"{cut.gain.mean:+.3f} bits saved"
    return f"{cut.gain.mean:+.3f} bits saved, 95 % interval {cut.gain.low:+.3f} to {cut.gain.high:+.3f}"


def _sample(model: Model, data: Corpus, device: torch.device, reporter: Reporter) -> tuple[str, str]:
    """Held-out text from the middle (from the start of a line if one is near), and the model's continuation."""
    middle, tokenizer = data.held_out.size // 2, data.tokenizer
    # A transformer may have a table of positions.
    room = min(
        getattr(model.config, "max_positions", None) or SAMPLE_PROMPT + SAMPLE_BYTES, SAMPLE_PROMPT + SAMPLE_BYTES
    )
    given_size = room * SAMPLE_PROMPT // (SAMPLE_PROMPT + SAMPLE_BYTES)
    new_size = room - given_size
    if tokenizer.is_bytes:
        middle += data.held_out[middle : middle + given_size].tobytes().find(b"\n") + 1
    prompt = data.held_out[middle : middle + given_size].astype(np.int64)
    with task(reporter, f"Generating a sample of {new_size} {data.unit}"):
        tokens = model.generate(
            torch.from_numpy(prompt)[None].to(device),
            new_size,
            temperature=0.8,
            top_p=0.95,
            seed=0,
            on_token=lambda step: reporter.advance(step / new_size),
        )
    found = tokens[0].cpu().numpy()
    given, new = (tokenizer.decode(part).decode("utf-8", "replace") for part in (prompt, found[prompt.size :]))
    return given, new


def _compose(
    record: dict[str, Any],
    settings: TrainSettings,
    evaluation: Evaluation,
    metrics: list[dict[str, Any]],
    pictures: dict[str, Path],
    patterns: dict[str, Path],
    prompt: str,
    continuation: str,
) -> str:
    data, machine, baselines, unit = record["data"], record["machine"], evaluation.baselines, evaluation.unit
    last = [line for line in metrics if line["kind"] == "train"][-1]
    page = Page(
        "LongNet training run",
        f"{last['step']:,} steps, {last['tokens']:,} {unit}, {format_seconds(last['seconds'])} on {machine['device']} "
        f"({machine['name']}), {settings.context:,} {unit} of context, trained on {data['source']}",
    )
    page.cards(
        [
            (f"{evaluation.bits_per_byte.mean:.3f}", "bits per held-out byte"),
            (f"{baselines.lzma:.3f}", "bits with lzma, preset 9 | EXTREME"),
            (f"{baselines.unigram:.3f}", "bits with the unigram of the training data"),
            (f"{baselines.unigram_own:.3f}", "bits with their own unigram"),
            (f"{last['tokens'] / max(last['seconds'], 0.001):,.0f}", f"{unit} trained on per second"),
        ]
    )
    page.text(
        f"All bits per byte are about the same {baselines.compressed_bytes:,} held-out bytes. The model reads them in "
        f"{evaluation.windows:,} windows of {evaluation.context:,} {unit}, each without earlier context; lzma reads them as "
        "one stream, without any training data.",
        "soft",
    )
    page.heading("Does it use the long context?")
    page.text(long_context_verdict(evaluation), "verdict")
    page.picture(pictures["positions"], f"Held-out bits per byte by {unit} of context")
    page.text(
        f"Left: all scored {unit}, by the number of {unit} before them in their window; every point has others. "
        f"Right: the same {unit} twice, in the second half of {min(CUT_WINDOWS, evaluation.windows)} windows, once with their "
        "context cut to half of that length or more, once whole; 95 % intervals over windows.",
        "soft",
    )
    page.heading("Loss")
    page.picture(pictures["loss"], "Bits per byte over the run")
    page.heading("Attention pattern, per head")
    for kind, picture in patterns.items():
        page.picture(picture, "Which keys each head reads" + (f" in layers of {kind}" if len(patterns) > 1 else ""))
    if settings.model.head_numbers is not None:
        page.text("All heads are drawn, those pruned from some layers too.", "soft")
    page.heading("A sample")
    page.text("Held-out text in grey, then the model (temperature 0.8, top-p 0.95).", "soft")
    page.sample(prompt, continuation)
    page.heading("Data")
    page.table((name, f"{value:,}" if isinstance(value, int) else value) for name, value in data.items())
    page.heading("Settings")
    page.table((name, value) for name, value in settings.to_dict().items() if name not in ("model", "data", "out"))
    page.heading("Model")
    page.table([("parameters", f"{record['parameters']:,}"), *settings.model.to_dict().items()])
    page.heading("Versions")
    page.table((name, value or "from source") for name, value in {**record["versions"], **machine}.items())
    return page.html()
