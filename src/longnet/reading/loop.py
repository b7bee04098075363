"""Streaming: check, open, restore, then read chunk by chunk until the data or the tokens end, or the user stops."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import BinaryIO

import torch
from torch import Tensor

from longnet.reading.feed import Feeder
from longnet.reading.folder import StreamFolder, check_resume, model_digest
from longnet.reading.reader import StreamReader
from longnet.reading.record import StreamRecord
from longnet.reading.settings import STANDARD_INPUT, StreamSettings
from longnet.reading.source import ByteSource, FileBytes, PipedBytes
from longnet.reading.table import StreamResult
from longnet.training.checkpoint import CheckpointError
from longnet.training.device import autocast, choose_dtype, resolve_device
from longnet.training.folder import load_model
from longnet.training.lock import locked
from longnet.training.progress import Reporter, SilentReporter


def stream(
    settings: StreamSettings,
    *,
    resume: bool = False,
    pipe: BinaryIO | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StreamResult:
    """Read bytes through a trained model with its cache; score every byte but the first, given all before it.

    Memory depends on the model and the chunk, and on how much is read only where full or strided layers keep their keys of it.

    Args:
        settings: what to do.
        resume: continue from the state in ``settings.out``. With the same chunk and device the result is that of a stream that
            was never stopped.
        pipe: what ``-`` stands for, default standard input.
        reporter: receives progress messages; silent by default.
        should_stop: asked between chunks; once true, the state is saved and the call returns.
        waiting: entered while waiting for bytes. A KeyboardInterrupt inside asks to stop and loses nothing.

    Raises:
        ValueError: settings, data, a model or a folder that cannot be used, a state that is damaged.
        OSError: a file that could not be read or written.
    """
    tell, stop = reporter or SilentReporter(), should_stop or (lambda: False)
    settings, device = _resolve(settings)
    folder = StreamFolder(settings.out)
    with ExitStack() as stack:
        stack.enter_context(locked(settings.out))
        state = folder.read_state() if resume else None
        if state is None:
            folder.require_new()
        from_pipe = settings.data == (STANDARD_INPUT,)
        source: ByteSource = PipedBytes(pipe or sys.stdin.buffer) if from_pipe else FileBytes(settings.data, tell.say)
        stack.callback(source.close)
        model = load_model(settings.run, device)
        if settings.dtype == "float32" and model.embedding.weight.dtype == torch.bfloat16:
            # Without autocast a model computes in the dtype of its weights.
            model = model.float()
        digest = model_digest(model)
        if state is not None:
            for note in check_resume(state, settings, digest, str(device)):
                tell.say(note)
        # One autocast around everything: it casts each weight once.
        stack.enter_context(torch.inference_mode())
        stack.enter_context(autocast(device, getattr(torch, settings.dtype)))
        reader = StreamReader(model)
        if state is not None:
            reader.load_state_dict(state.tensors)
            if reader.position != state.progress["position"]:
                raise CheckpointError(
                    f"{state.path} is damaged: its position is {state.progress['position']}, and its cache's {reader.position}"
                )
        with waiting():
            source.start_at(reader.position, None if state is None else state.progress["data"])
        assert settings.chunk is not None
        feeder = Feeder(source, settings.chunk, device)
        record = StreamRecord(settings, folder, source, reader, device, digest, tell)
        limit = _describe(settings, source, reader.position, device, tell)
        if not reader.cache.bounded:
            tell.say("Memory grows with what is read: full and strided layers keep their keys of all of it")

        def next_chunk() -> Tensor:
            with waiting():
                return feeder.next(None if limit is None else limit - reader.position)

        tokens = next_chunk()
        if reader.position + tokens.numel() < 2:
            raise ValueError(f"data hold {tokens.numel()} byte(s): expected at least 2, as the first is not predicted")
        record.start(state, limit)
        stack.callback(record.close)
        try:
            finished = True
            while tokens.numel():
                reader.read(tokens)
                record.after_chunk()
                if stop():
                    finished = False
                    break
                try:
                    tokens = next_chunk()
                except KeyboardInterrupt:
                    finished = False
                    break
            if finished and settings.tokens is not None and reader.position < settings.tokens:
                tell.say(f"The data ended after {reader.position:,} bytes, before the {settings.tokens:,} asked for")
            return record.finish(finished)
        except (ValueError, TypeError, torch.OutOfMemoryError):
            # For example a model whose first chunks give losses that are not finite.
            if not record.saved_position:
                record.close()
                folder.remove()
            raise


def _resolve(settings: StreamSettings) -> tuple[StreamSettings, torch.device]:
    """Settings with their chunk and dtype chosen, and the device.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    device = resolve_device(settings.device, "float32")
    on_cuda, dtype, chunk = device.type == "cuda", settings.dtype, settings.chunk
    if dtype == "auto":
        dtype = choose_dtype(str(device)) if on_cuda else "float32"
    if chunk is None:
        chunk = 65536 if on_cuda else 8192
    return replace(settings, dtype=dtype, chunk=chunk), device


def _describe(
    settings: StreamSettings, source: ByteSource, position: int, device: torch.device, tell: Reporter
) -> int | None:
    """Report what will be read; return where reading ends, None if that is not known yet."""
    ends = [end for end in (settings.tokens, source.total) if end is not None]
    limit = min(ends) if ends else None
    data = "standard input" if source.total is None else f"{source.total:,} bytes in {source.files:,} file(s)"
    far = "to its end" if limit is None or limit == source.total else f"{limit:,} bytes of it"
    tell.say(
        f"Data: {data}, {far}; on {device} in {settings.dtype}, {settings.chunk:,} bytes a chunk, into {settings.out}"
    )
    if source.total is not None and settings.tokens is not None and source.total < settings.tokens:
        tell.say(f"Note: the data end before the {settings.tokens:,} bytes asked for")
    if position:
        tell.say(f"Resuming after {position:,} bytes")
    return limit
