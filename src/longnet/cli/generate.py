"""``longnet generate``."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder of longnet train.", metavar="RUN")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="File whose bytes to continue, - for standard input.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens (bytes, for a model of bytes) to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End after this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Continue a prompt with a trained model; its text goes to standard output as it is drawn.
    Progress goes to standard error, unless standard output is a terminal.

    Bytes that are not valid UTF-8 are shown as the replacement character.
    """
    import torch

    from longnet.models.generation import Sampling
    from longnet.models.placement import device_of
    from longnet.training.device import resolve_device
    from longnet.training.folder import RunFolder, load_trained
    from longnet.training.progress import SilentReporter, make_reporter
    from longnet.training.transformer import TransformerLM

    content = _read_prompt(prompt, file)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected at least 1")
    Sampling(temperature, top_k, top_p)
    endings = [text.encode("utf-8", "surrogateescape") for text in stop or []]
    if not all(endings):
        raise ValueError("stop is empty: expected at least one character")
    model, tokenizer = load_trained(run, resolve_device(device, "float32")), RunFolder(run).tokenizer
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model in {str(run)!r} has {model.config.vocab_size} tokens, and its folder no tokenizer of as many: expected "
            "the tokenizer.json that it was trained with beside it"
        )
    (ids,) = tokenizer.encode([content])
    start = torch.from_numpy(ids.astype("int64"))[None].to(device_of(model.embedding))
    if isinstance(model, TransformerLM):
        model.check_length(len(ids), tokens, "--tokens")
    decoder, read, text = codecs.getincrementaldecoder("utf-8")("replace"), tokenizer.reader(ids), b""

    def show(new: bytes, final: bool = False) -> None:
        sys.stdout.write(decoder.decode(new, final))
        sys.stdout.flush()

    def extend(new: torch.Tensor) -> None:
        nonlocal text
        seen = len(text)
        text += b"".join(read(token) for token in new.tolist())
        # An ending may begin in what was shown before.
        ends = [at + len(one) for one in endings if (at := text.find(one, max(0, seen - len(one) + 1))) >= 0]
        show(text[seen : min(ends, default=None)])
        if ends:
            raise _Ended

    # On a terminal the text itself shows how far it is.
    reporter = SilentReporter() if sys.stdout.isatty() else make_reporter(sys.stderr)
    reporter.begin(f"Generating {tokens:,} {'bytes' if tokenizer.is_bytes else 'tokens'} after {len(ids):,}")
    show(content)
    try:
        model.generate(
            start,
            tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos=tokenizer.end,
            on_token=lambda step: reporter.advance(step / tokens),
            streamer=extend,
        )
        show(read(None))
    except _Ended:
        pass
    finally:
        reporter.end()
        show(b"", final=True)
        print()


class _Ended(Exception):
    """The text has come to one of its endings."""


def _read_prompt(prompt: str | None, file: Path | None) -> bytes:
    """The bytes to continue, at least one.

    Raises:
        ValueError: neither or both of prompt and file, or an empty prompt.
    """
    if (prompt is None) == (file is None):
        raise ValueError("expected a prompt, either as --prompt TEXT or as --file PATH")
    if prompt is not None:
        content = prompt.encode("utf-8", "surrogateescape")
    elif str(file) == "-":
        content = sys.stdin.buffer.read()
    else:
        assert file is not None
        content = file.read_bytes()
    if not content:
        raise ValueError("the prompt is empty: expected at least one byte to continue")
    return content
