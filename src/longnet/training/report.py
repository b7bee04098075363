"""What a run came to: held-out bits per byte by position, baselines, figures and a sample, as JSON and one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longnet.figures import plot_pattern
from longnet.geometry.pattern import Pattern
from longnet.models import LongNetConfig, LongNetLM
from longnet.training.baselines import Baselines, measure_baselines
from longnet.training.charts import plot_loss, plot_positions
from longnet.training.data import Corpus, read_corpus
from longnet.training.evaluate import (
    Estimate,
    LongContextGain,
    PositionBin,
    measure_long_context,
    profile_positions,
    score_windows,
    window_starts,
)
from longnet.training.files import read_json, write_json, write_text
from longnet.training.folder import RunFolder, load_model
from longnet.training.metrics import read_metrics
from longnet.training.page import Page
from longnet.training.progress import Reporter, SilentReporter, format_seconds
from longnet.training.resume import read_settings
from longnet.training.settings import DTYPES, TrainSettings, resolve_device

SCORED_BYTES = 1 << 22
"""Most held-out bytes that are scored and compressed; more are sampled in evenly spaced windows."""
SAMPLE_PROMPT, SAMPLE_BYTES = 384, 512


@dataclass(frozen=True)
class Evaluation:
    """The held-out result of a run; bits per byte throughout.

    Attributes:
        bits_per_byte: over all scored bytes.
        context: bytes per window.
        windows: how many were scored.
        scored_bytes: the bytes that ``bits_per_byte`` and the baselines are about, each scored once.
        positions: by bytes of context.
        long_context: what more context is worth; ``None`` for windows too short to tell.
        baselines: of the same bytes.
    """

    bits_per_byte: Estimate
    context: int
    windows: int
    scored_bytes: int
    positions: list[PositionBin]
    long_context: LongContextGain | None
    baselines: Baselines


def write_report(run: str | Path, *, corpus: Corpus | None = None, reporter: Reporter | None = None) -> Evaluation:
    """Evaluate the model of a run folder and write ``evaluation.json``, the PNGs and ``report.html`` into it.

    Args:
        run: the ``--out`` folder of a run that has saved a model.
        corpus: the run's data, if the caller has read it already.
        reporter: hears what is being done.

    Raises:
        ValueError: no finished model there, or data that are not the run's any more.
    """
    tell = reporter or SilentReporter()
    folder = RunFolder(run)
    settings = read_settings(folder)
    device = resolve_device(settings.device, settings.dtype)
    record = read_json(folder.settings_file)
    data = corpus or read_corpus(settings.data, tell.say)
    if data.fingerprint != record["data"]["fingerprint"]:
        raise ValueError(f"data {data.source!r} is not what the run in {str(folder.path)!r} was trained on")
    metrics = read_metrics(folder.metrics_file)
    if not any(line["kind"] == "train" for line in metrics):
        raise ValueError(f"the run in {str(folder.path)!r} has done no step yet: expected one to report on")
    model = load_model(folder.path, device)
    evaluation = evaluate_model(model, data, settings, device, tell)
    write_json(folder.evaluation_file, asdict(evaluation))
    tell.say("Drawing the figures")
    pictures = {name: folder.path / f"{name}.png" for name in ("loss", "positions", "pattern")}
    plot_loss(metrics, evaluation.baselines, pictures["loss"])
    plot_positions(evaluation.positions, evaluation.baselines, pictures["positions"])
    _plot_pattern(settings.model, settings.context, pictures["pattern"])
    prompt, continuation = _sample(model, data, device, tell)
    record["parameters"] = sum(weight.numel() for weight in model.parameters())
    write_text(folder.report_file, _compose(record, settings, evaluation, metrics, pictures, prompt, continuation))
    tell.say(f"Report: {folder.report_file}")
    return evaluation


def evaluate_model(
    model: LongNetLM, data: Corpus, settings: TrainSettings, device: torch.device, reporter: Reporter
) -> Evaluation:
    """Score the held-out bytes by position, with and without the farther half of the context, and measure baselines."""
    context = min(settings.context, data.held_out.size - 1)
    starts = window_starts(data.held_out.size, context, max(8, SCORED_BYTES // context))
    scored = np.concatenate([data.held_out[start + 1 : start + context + 1] for start in starts.tolist()])
    baselines = measure_baselines(data.train, scored, reporter.say)

    def score(title: str, length: int, at: np.ndarray) -> np.ndarray:
        reporter.begin(title)
        try:
            return score_windows(
                model,
                data.held_out,
                length,
                at,
                batch=settings.batch,
                device=device,
                dtype=DTYPES[settings.dtype],
                on_progress=reporter.advance,
            )
        finally:
            reporter.end()

    bits = score(f"Scoring {scored.size:,} held-out bytes", context, starts)
    gain = None
    if context >= 4:
        late = score("Scoring again with half the context", context // 2, starts + context // 2)
        gain = measure_long_context(bits, late)
    overall = Estimate.over_windows(bits.mean(axis=1, dtype=np.float64))
    return Evaluation(overall, context, int(starts.size), int(scored.size), profile_positions(bits), gain, baselines)


def long_context_verdict(evaluation: Evaluation) -> str:
    """Whether the model uses the long context, in one sentence computed from the data."""
    gain = evaluation.long_context
    if gain is None:
        return f"A context of {evaluation.context} bytes is too short to tell whether the model uses a long one."
    what = (
        f"bytes that have {gain.first:,} to {gain.last:,} bytes of context cost {gain.short:.3f} bits each, "
        f"and {gain.long:.3f} with {gain.extra:,} more bytes before them"
    )
    low, high = gain.gain.low, gain.gain.high
    if low is None or high is None:
        return f"Undecided, with one held-out window alone: {what}."
    change = f"{gain.gain.mean:+.3f} bits saved, 95 % interval {low:+.3f} to {high:+.3f}, the same bytes both times"
    if low > 0:
        return f"Yes, the model uses its long context: {what} ({change})."
    if high < 0:
        return f"No, the farther half of the context does harm: {what} ({change})."
    return f"No use of the farther half of the context can be shown: {what} ({change})."


def _plot_pattern(config: LongNetConfig, context: int, path: Path) -> None:
    pattern = Pattern.parse(config.segment_lengths, config.dilation_rates, config.head_offsets)
    plot_pattern(pattern, config.heads, context, path)


def _sample(model: LongNetLM, data: Corpus, device: torch.device, reporter: Reporter) -> tuple[str, str]:
    """A held-out beginning and how the model goes on."""
    prompt = data.held_out[: min(SAMPLE_PROMPT, data.held_out.size)].astype(np.int64)
    reporter.begin(f"Generating a sample of {SAMPLE_BYTES} bytes")
    try:
        tokens = model.generate(
            torch.from_numpy(prompt)[None].to(device),
            SAMPLE_BYTES,
            temperature=0.8,
            top_p=0.95,
            seed=0,
            on_token=lambda step: reporter.advance(step / SAMPLE_BYTES),
        )
    finally:
        reporter.end()
    text = bytes(tokens[0].tolist())
    return text[: prompt.size].decode("utf-8", "replace"), text[prompt.size :].decode("utf-8", "replace")


def _compose(
    record: dict[str, Any],
    settings: TrainSettings,
    evaluation: Evaluation,
    metrics: list[dict[str, Any]],
    pictures: dict[str, Path],
    prompt: str,
    continuation: str,
) -> str:
    data, machine, baselines = record["data"], record["machine"], evaluation.baselines
    last = [line for line in metrics if line["kind"] == "train"][-1]
    page = Page(
        "LongNet training run",
        f"{last['step']:,} steps, {last['tokens']:,} bytes, {format_seconds(last['seconds'])} on {machine['device']} "
        f"({machine['name']}), {settings.context:,} bytes of context, trained on {data['source']}",
    )
    page.cards(
        [
            (f"{evaluation.bits_per_byte.mean:.3f}", "bits per held-out byte"),
            (f"{baselines.lzma:.3f}", "lzma, preset 9 | EXTREME"),
            (f"{baselines.unigram:.3f}", "unigram of the training data"),
            (f"{baselines.unigram_own:.3f}", "unigram of the held-out bytes"),
            (f"{last['tokens'] / last['seconds']:,.0f}", "bytes trained on per second"),
        ]
    )
    page.text(
        f"All of these are about the same {evaluation.scored_bytes:,} held-out bytes. The model saw them in "
        f"{evaluation.windows:,} windows of {evaluation.context:,} bytes and starts each with no context; lzma compresses "
        "them as one stream and has read no training data.",
        "soft",
    )
    page.heading("Does it use the long context?")
    page.text(long_context_verdict(evaluation), "verdict")
    page.picture(pictures["positions"], "Held-out bits per byte by position in the context")
    page.heading("Loss")
    page.picture(pictures["loss"], "Bits per byte over the run")
    page.heading("Attention pattern, per head")
    page.picture(pictures["pattern"], "Which keys each head reads")
    page.heading("A sample")
    page.text("The beginning of the held-out bytes in grey, then the model (temperature 0.8, top-p 0.95).", "soft")
    page.sample(prompt, continuation)
    page.heading("Data")
    page.table(
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value) for name, value in data.items()
    )
    page.heading("Settings")
    plain = {name: value for name, value in settings.to_dict().items() if name not in ("model", "data", "out")}
    page.table((name.replace("_", " "), value) for name, value in plain.items())
    page.heading("Model")
    shape = {"parameters": f"{record['parameters']:,}", **settings.model.to_dict()}
    page.table((name.replace("_", " "), value) for name, value in shape.items())
    page.heading("Versions")
    page.table((name, value or "from source") for name, value in {**record["versions"], **machine}.items())
    return page.html()
