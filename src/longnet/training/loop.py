"""Training: check, read, build or restore, then run the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch

from longnet.checks import check_callable, short_repr
from longnet.models import LongNetConfig
from longnet.models.threads import torch_threads
from longnet.runtime.torch_internals import many_recompilations
from longnet.runtime.triton_support import HAS_TRITON
from longnet.training.data import (
    Corpus,
    check_documents,
    check_lengths,
    check_no_row_options,
    check_outside,
    is_prepared,
    read_corpus,
    remove_prepared,
)
from longnet.training.device import resolve_device
from longnet.training.estimate import describe_step
from longnet.training.folder import RunFolder
from longnet.training.initial import copy_weights, read_initial
from longnet.training.lock import locked
from longnet.training.models import Model, fit_context, make_model
from longnet.training.progress import Reporter, SilentReporter
from longnet.training.ranks import Ranks
from longnet.training.resume import check_resume, check_starting, data_change, open_data, read_settings
from longnet.training.settings import TrainSettings, changed_fields
from longnet.training.sharded import find_checkpoint
from longnet.training.track import Callback, check_tracker, tracked
from longnet.training.trainer import Trainer, TrainSummary
from longnet.training.transformer_config import TransformerConfig

# With fewer numbers in the residual of a pass, a second thread gains a tenth at most on two idle cores. Threads wait for each
# other at every operation: beside another load several threads take several times as long as one.
_SMALL = 1 << 17


def train(
    settings: TrainSettings,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    callbacks: Sequence[Callback] = (),
) -> TrainSummary:
    """Train a LongNet, or a decoder of Hugging Face under dilated attention, into a run folder.

    The caller's random generators and thread count are restored at the end.

    Args:
        settings: what to do; ``settings.out`` is the run folder.
        resume: continue the run in the folder, or begin it after a stop while its data were prepared. Given the same settings,
            its losses are those of a run that was never stopped (a schedule driven by ``minutes`` depends on the clock and
            cannot promise that).
        corpus: the data, if the caller has already read them; else those of ``settings.data`` are prepared in the folder ``data``
            of the run, and read from there alone afterwards.
        reporter: receives progress messages; silent by default.
        should_stop: asked between steps; once true, the state is saved and the call returns.
        ranks: the processes that train together, see ``longnet.training.ranks.join_ranks``; all call, the first writes.
        waiting: entered while the data are read. A KeyboardInterrupt inside ends the call; no file has changed yet.
        callbacks: called in the first process with each line of ``metrics.jsonl``, after it is written: a step
            (``line["kind"] == "train"``) or an evaluation (``"eval"``). Each gets a dictionary of its own. An error of a
            callback ends the run, which can be resumed from its last checkpoint.

    Raises:
        TypeError: an argument of the wrong type, before anything is written.
        ValueError: settings, data, a tracker or a run folder that cannot be used, a checkpoint that is damaged.
        TrainingDiverged: a loss or gradient that is not finite.
        OSError: a file that could not be written.
    """
    _check_types(settings, corpus, should_stop, callbacks)
    ranks = ranks or Ranks()
    ranks.check(settings.batch, settings.dtype, settings.cp)
    tell = reporter or SilentReporter()
    device = resolve_device(settings.device, settings.dtype)
    compiled = _compiled(settings, device, tell)
    check_tracker(settings.track)
    if isinstance(settings.model, TransformerConfig):
        _check_transformer(settings.model, settings.context)
    if resume:
        RunFolder(settings.out).require_resumable()
    with _locked_by_first(settings.out, ranks):
        folder = RunFolder(settings.out)
        if resume and folder.is_starting:
            check_starting(folder, settings)
            tell.say("The run was stopped while its data were prepared: going on with them, then it begins")
            resume = False
        if resume:
            folder.require_run()
        else:
            folder.require_new()
        with _removed_if_refused(folder, ranks, resume):
            if settings.checkpoint == "sharded":
                ranks.check_shared(settings.out)
            with waiting():
                data = corpus or _read_data(settings, folder, ranks, tell)
            check_lengths(data, settings.context)
            if settings.pack is not None:
                check_documents(data)
                if data.train_documents == 1:
                    tell.say("pack='documents' changes nothing: the training data are one document")
            if (tokens := data.tokenizer.vocab_size) != settings.model.vocab_size:
                made = (
                    f"read_transformer(..., tokenizer_size={tokens})"
                    if isinstance(settings.model, TransformerConfig)
                    else f"LongNetConfig(..., vocab_size={tokens})"
                )
                raise ValueError(
                    f"vocab_size={settings.model.vocab_size} in the model: expected {made}, as the tokenizer has {tokens} tokens"
                )
            tell.say(
                f"Data: {data.train.size:,} training {data.unit} in {data.train_documents:,} documents, "
                f"{data.held_out.size:,} held out in {data.held_out_documents:,} ({data.split})"
            )
            checkpoint = None
            if resume:
                checkpoint = find_checkpoint(folder.checkpoint_folder, ranks.control)
                for note in check_resume(folder, settings, data, checkpoint):
                    tell.say(note)
            saved = read_settings(folder) if resume else None
            tokenizer = _describe_tokenizer(settings, data)
            settings, initial = read_initial(settings, saved, checkpoint is not None, tokenizer, tell.say)
            # No process writes before all have checked the folder.
            ranks.wait()
            cuda = [device] if device.type == "cuda" else []
            is_small = device.type == "cpu" and settings.batch * settings.context * settings.model.dim < _SMALL
            threads = 1 if settings.threads is None and is_small else settings.threads
            with torch_threads(threads), torch.random.fork_rng(devices=cuda):
                # Before the model takes memory of the device.
                for line in ranks.choose_cut(settings, device):
                    tell.say(line)
                # And before the seed: a product of random numbers is timed.
                if ranks.is_first and not isinstance(tell, SilentReporter):
                    _say_estimate(settings, device, ranks, tell, {} if checkpoint is None else checkpoint.progress)
                torch.manual_seed(settings.seed)
                model = _new_model(settings, device)
                copy_weights(initial, model)
                del initial
                trainer = Trainer(settings, folder, data, model, device, tell, ranks)
                done = 0 if checkpoint is None else checkpoint.progress["step"]
                with (
                    closing(trainer),
                    tracked(settings, folder, done, ranks) as trackers,
                    many_recompilations() if compiled else nullcontext(),
                ):
                    # Trackers come first: they get the line that a callback raises an error for.
                    trainer.callbacks = [*trackers, *callbacks]
                    if compiled:
                        _compile_blocks(model, settings, ranks)
                        tell.say("Compiling the blocks: the first step and the first evaluation take longer")
                    trainer.start(checkpoint)
                    return trainer.run(should_stop or (lambda: False))


def _check_types(
    settings: TrainSettings,
    corpus: Corpus | None,
    should_stop: Callable[[], bool] | None,
    callbacks: Sequence[Callback],
) -> None:
    """Raise TypeError for an argument of :func:`train` that is of another type."""
    for name, value, kind, expected in (
        ("settings", settings, TrainSettings, "TrainSettings"),
        ("corpus", corpus, Corpus | None, "a Corpus of read_corpus, or None"),
        ("callbacks", callbacks, Sequence, "a sequence of functions"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}={short_repr(value)} has type {type(value).__name__}: expected {expected}")
    check_callable("should_stop", should_stop)
    for one in callbacks:
        if not callable(one):
            raise TypeError(f"callbacks holds {short_repr(one)} of type {type(one).__name__}: expected functions")


def _describe_tokenizer(settings: TrainSettings, data: Corpus) -> str:
    """The tokenizer of the data in words: prepared data have their own, whatever the settings name."""
    if data.tokenizer.is_bytes:
        return "bytes"
    if settings.tokenizer == "bytes":
        return f"that of the prepared data, {data.tokenizer.vocab_size:,} tokens"
    return settings.tokenizer


def _check_transformer(model: TransformerConfig, context: int) -> None:
    """Raise ValueError unless the model takes windows of ``context`` tokens, before anything is read or written."""
    fitted = fit_context(model, context)
    if changes := changed_fields(model, fitted):
        raise ValueError(
            f"the model does not fit context={context}: expected longnet.training.read_transformer(folder, {context}), where "
            f"{', '.join(change.replace(' was ', '=').replace(', now ', ' becomes ') for change in changes)}"
        )


def _new_model(settings: TrainSettings, device: torch.device) -> Model:
    """The model with random weights in the dtype of the run; buffers of transformers' models stay float32."""
    dtype = getattr(torch, settings.weights)
    if isinstance(settings.model, TransformerConfig):
        return make_model(settings.model, dtype=dtype).to(device)
    return make_model(settings.model).to(device, dtype)


def _read_data(settings: TrainSettings, folder: RunFolder, ranks: Ranks, tell: Reporter) -> Corpus:
    """The data of a run: what it has prepared, or is to prepare now; the first process does it for all."""
    error: Exception | None = None
    made: Corpus | None = None
    is_there = folder.settings_file.exists() and is_prepared(folder.data_folder)
    if settings.data and is_prepared(settings.data) and not folder.settings_file.exists():
        check_no_row_options(settings.data, "is prepared already", settings.field, settings.skip_bad_rows)
    is_made = not is_there and not (settings.data and is_prepared(settings.data))
    if ranks.is_first:
        try:
            if is_made:
                check_outside(settings.data, settings.out)
            if not folder.settings_file.exists():
                folder.write_starting(settings.to_dict())
            if is_made:
                made = _prepare(settings, folder, tell)
        except (ValueError, OSError, ModuleNotFoundError) as refusal:
            error = refusal
    ranks.agree(error)
    return made or open_data(folder, settings, tell.say)


def _prepare(settings: TrainSettings, folder: RunFolder, tell: Reporter) -> Corpus:
    """The data of a run, prepared in its folder.

    Raises:
        ValueError: as ``read_corpus``, or other data than those that a run has lost.
    """
    made = read_corpus(
        settings.data,
        tell.say,
        tokenizer=settings.tokenizer,
        field=settings.field,
        folder=folder.data_folder,
        skip_bad_rows=settings.skip_bad_rows,
    )
    if folder.settings_file.exists() and (change := data_change(folder, made)) is not None:
        remove_prepared(folder.data_folder)
        raise ValueError(
            f"{folder.data_folder} is gone, and data {made.source!r} is not what the run was started on ({change}): "
            "expected the same text, or train(corpus=...) with what the run was given"
        )
    return made


def _say_estimate(
    settings: TrainSettings, device: torch.device, ranks: Ranks, tell: Reporter, progress: dict[str, Any]
) -> None:
    if isinstance(settings.model, TransformerConfig):
        tell.say("No estimate of a step's memory and time: it is made for LongNets alone")
        return
    done = {"steps_done": progress.get("step", 0), "seconds_done": progress.get("seconds", 0.0)}
    try:
        longest = max(ranks.cut(settings.context))
        for line in describe_step(settings, device, dp=ranks.dp, cp=ranks.cp, longest=longest, **done):
            tell.say(line)
    except RuntimeError as error:
        # Of torch, out of memory among them. A run needs no estimate.
        tell.say(f"No estimate of a step's memory and time: {str(error).strip().splitlines()[0]}")


# The oldest GPUs that torch.compile's kernels run on.
_LEAST_CAPABILITY = (7, 0)


def _compiled(settings: TrainSettings, device: torch.device, tell: Reporter) -> bool:
    """Whether blocks are compiled; what is not done on a GPU is said."""
    if settings.compile is not None or device.type != "cuda":
        return bool(settings.compile)
    if isinstance(settings.model, TransformerConfig):
        tell.say(
            "Not compiling the blocks: dilated attention in transformers' models looks at the documents of each batch"
        )
        return False
    if not HAS_TRITON or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        tell.say(
            f"Not compiling the blocks: it needs triton, and a GPU of compute capability {_LEAST_CAPABILITY[0]} or more"
        )
        return False
    return True


def _compile_blocks(model: Model, settings: TrainSettings, ranks: Ranks) -> None:
    """Compile the blocks, in place. Of blocks that are alike one graph is made."""
    # Without the option dropout would draw other numbers than it does uncompiled.
    has_dropout = isinstance(settings.model, LongNetConfig) and settings.model.dropout
    options: dict[str, Any] = {"options": {"fallback_random": True}} if has_dropout else {}
    for block in model.blocks:
        # Not the call: several processes gather a block's weights around its forward. Part of a graph would not be noticed to
        # run uncompiled; where processes share a window, graphs break at the attention, in which they communicate.
        block.forward = torch.compile(block.forward, fullgraph=ranks.cp == 1, **options)


@contextmanager
def _removed_if_refused(folder: RunFolder, ranks: Ranks, resume: bool) -> Iterator[None]:
    """A run that is refused before its first step, or in it, leaves nothing behind. After a full disk preparation can go on.

    Some errors appear only in the first step, such as a backend that does not take the device.
    """
    try:
        yield
    except (ValueError, TypeError, MemoryError, ModuleNotFoundError, torch.OutOfMemoryError):
        has_stepped = folder.metrics_file.exists() and folder.metrics_file.stat().st_size > 0
        if ranks.is_first and not resume and not has_stepped:
            folder.remove()
        raise


@contextmanager
def _locked_by_first(out: str, ranks: Ranks) -> Iterator[None]:
    """The first process holds the lock on the run folder for all processes; if it cannot, all of them raise."""
    with ExitStack() as stack:
        error: Exception | None = None
        if ranks.is_first:
            try:
                stack.enter_context(locked(out))
            except (ValueError, OSError) as refusal:
                error = refusal
        ranks.agree(error)
        yield
