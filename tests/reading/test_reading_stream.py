"""A stream's bits per byte are those of one forward pass over everything, stopped and resumed or not."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from runs import make_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longnet.reading import StreamResult, format_table
from longnet.reading.reader import StreamReader, decade_counts, decade_of
from longnet.reading.record import LINES
from longnet.training import CheckpointError, load_model
from longnet.training.checkpoint import digest_tensors
from longnet.training.progress import SilentReporter

Read = Callable[..., StreamResult]
Lines = Callable[..., list[dict[str, Any]]]


def _bits(run: Path, content: bytes) -> torch.Tensor:
    """Bits of every byte but the first, from one pass without a cache."""
    tokens = torch.tensor([list(content)])
    with torch.no_grad():
        logits = load_model(run)(tokens)[0, :-1].double()
    return F.cross_entropy(logits, tokens[0, 1:], reduction="none") / math.log(2)


@pytest.mark.parametrize("chunk", [2, 7, 100, 617, 1233, 1234, 5000])
def test_the_bits_per_byte_of_one_whole_pass(chunk: int, run: Path, file: Path, read: Read) -> None:
    bits = _bits(run, file.read_bytes())
    result = read({"chunk": chunk})
    assert result.position == 1234 and result.finished
    assert result.bits_per_byte == pytest.approx(bits.mean().item(), abs=1e-6)
    assert [count for count, _ in result.decades] == [9, 90, 900, 234]
    for (_, value), part in zip(result.decades, bits.split([9, 90, 900, 234]), strict=True):
        assert value == pytest.approx(part.mean().item(), abs=1e-6)


@pytest.mark.parametrize("tokens", [2, 10, 11, 100, 101])
def test_tokens_are_how_far_it_reads(tokens: int, run: Path, file: Path, read: Read) -> None:
    result = read({"tokens": tokens, "chunk": 4})
    assert result.position == tokens
    bits = _bits(run, file.read_bytes()[:tokens])
    assert result.bits_per_byte == pytest.approx(bits.mean().item(), abs=1e-6)
    assert sum(count for count, _ in result.decades) == tokens - 1


def test_files_and_a_pipe_give_what_one_file_gives(file: Path, read: Read, tmp_path: Path) -> None:
    content = file.read_bytes()
    for name, part in (("a", content[:150]), ("b", content[150:151]), ("c", content[151:])):
        (tmp_path / name).write_bytes(part)
    whole = read()
    parts = read({"data": tuple(str(tmp_path / name) for name in "abc"), "out": str(tmp_path / "parts")})
    piped = read({"data": ("-",), "out": str(tmp_path / "piped")}, pipe=io.BytesIO(content))
    assert whole.decades == parts.decades == piped.decades
    assert whole.bits_per_byte == parts.bits_per_byte == piped.bits_per_byte


def test_bfloat16_makes_its_cache_in_bfloat16(run: Path, file: Path, read: Read, lines: Lines) -> None:
    exact = read()
    size = lines("settings")[0]["cache_bytes"]
    rounded = read({"dtype": "bfloat16", "out": str(file.parent / "rounded")})
    assert rounded.bits_per_byte == pytest.approx(exact.bits_per_byte or 0.0, rel=0.02)
    assert rounded.bits_per_byte != exact.bits_per_byte
    assert lines("settings", "rounded")[0]["cache_bytes"] < size


def test_what_is_kept_does_not_grow(run: Path) -> None:
    with torch.inference_mode():
        reader = StreamReader(load_model(run))
        sizes = set()
        for count in (5, 50, 200, 1):
            reader.read(torch.zeros(count, dtype=torch.int64))
            state = reader.state_dict()
            sizes.add((reader.cache.nbytes, sum(x.untyped_storage().nbytes() for x in state.values())))
    assert len(sizes) == 1


def test_a_full_layer_keeps_all_and_the_stream_says_so(run: Path, file: Path, read: Read, tmp_path: Path) -> None:
    class Said(SilentReporter):
        texts: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.texts.append(text)

    read(reporter=Said())
    assert not any("Memory grows" in text for text in Said.texts)
    types = ["sliding_attention", "full_attention"]
    full = make_run(tmp_path / "full", layer_types=types, shift_keys=True, far_positions=False, sliding_window=8)
    result = read({"run": str(full), "out": str(tmp_path / "other")}, reporter=Said())
    assert Said.texts.count("Memory grows with what is read: full and strided layers keep their keys of all of it") == 1
    assert result.bits_per_byte == pytest.approx(_bits(full, file.read_bytes()).mean().item(), abs=1e-6)


def test_decades() -> None:
    assert [decade_of(n) for n in (0, 9, 10, 99, 100, 10**9 - 1, 10**9)] == [0, 0, 1, 1, 2, 8, 9]
    assert decade_counts(1)[:2] == [0, 0]
    assert decade_counts(10)[:2] == [9, 0]
    assert decade_counts(11)[:3] == [9, 1, 0]
    assert decade_counts(10**9)[:10] == [9 * 10**k for k in range(9)] + [0]


def test_stopped_and_resumed_it_ends_with_the_same_bits(file: Path, read: Read, lines: Lines, tmp_path: Path) -> None:
    whole = read({"out": str(tmp_path / "whole")})
    asked = iter([False, False, True])
    stopped = read(should_stop=lambda: next(asked))
    assert (stopped.position, stopped.finished) == (300, False)
    assert not lines("result")
    again = read(resume=True)
    assert again.decades == whole.decades and again.bits_per_byte == whole.bits_per_byte
    assert lines()[-1]["decades"] == lines(out="whole")[-1]["decades"]
    assert [line["position"] for line in lines("resumed")] == [300]
    assert sum(line["new_bytes"] for line in lines("progress")) == 1234


def test_lines_past_the_state_are_dropped(read: Read, lines: Lines, tmp_path: Path) -> None:
    read({"tokens": 300})
    record = tmp_path / "out" / "stream.jsonl"
    record.write_bytes(record.read_bytes() + b'{"kind": "progress", "position": 400}\n{"kind": "prog')
    result = read({"tokens": None}, resume=True)
    assert 400 not in [line["position"] for line in lines()]
    assert [line["position"] for line in lines("result")] == [1234]
    assert result.decades == read({"out": str(tmp_path / "whole")}).decades


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("progress", '"kind"', '"kinc"', "has no 'kind', expected one of"),
        ("result", '"result"', '"resulu"', "has kind='resulu', expected one of"),
        *(
            (kind, f'"{name}"', f'"{name[:-1]}_"', rf"\({kind}\) has no '{name}'")
            for kind in ("settings", "progress")
            for name in LINES[kind]
            if name != "position"
        ),
        ("progress", '"new_bytes": 1', '"new_bytes": -1', r"\(progress\) has new_bytes=-1"),
        ("progress", '"new_seconds": ', '"new_seconds": 0, "x": ', r"\(progress\) has new_seconds=0"),
        ("progress", '"bits_per_byte": ', '"bits_per_byte": "8", "x": ', r"\(progress\) has bits_per_byte='8'"),
    ],
)
def test_a_damaged_line_of_the_record_is_named(
    kind: str, old: str, new: str, message: str, read: Read, tmp_path: Path
) -> None:
    read({"tokens": 300, "save_every": 0.0})
    record = tmp_path / "out" / "stream.jsonl"
    lines = record.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if f'"kind": "{kind}"' in line)
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new, 1)
    record.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=rf"stream\.jsonl is damaged: line {number + 1}.*{message}"):
        read({"tokens": None}, resume=True)


def test_a_pipe_is_gone_on_with_by_piping_it_again(file: Path, read: Read, tmp_path: Path) -> None:
    content = file.read_bytes()
    read({"data": ("-",), "tokens": 300}, pipe=io.BytesIO(content))
    again = read({"data": ("-",)}, pipe=io.BytesIO(content), resume=True)
    assert again.decades == read({"out": str(tmp_path / "whole")}).decades


def test_waiting_can_be_interrupted_and_loses_nothing(file: Path, read: Read, tmp_path: Path) -> None:
    class Stalled(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if self.tell() >= 250:
                raise KeyboardInterrupt
            return super().readinto(buffer[: 250 - self.tell()])

    stopped = read({"data": ("-",)}, pipe=Stalled(file.read_bytes()))
    assert (stopped.position, stopped.finished) == (200, False)
    again = read({"data": ("-",)}, pipe=io.BytesIO(file.read_bytes()), resume=True)
    assert again.decades == read({"out": str(tmp_path / "whole")}).decades


def test_the_record(file: Path, run: Path, read: Read, lines: Lines) -> None:
    result = read({"save_every": 0.0})
    first, *progress, last = lines()
    assert first["kind"] == "settings" and first["files"] == 1 and first["bytes"] == 1234 and first["chunk"] == 100
    assert [line["position"] for line in progress] == [*range(100, 1300, 100), 1234]
    assert all(line["tokens_per_second"] > 0 and line["memory_peak"] for line in progress)
    bits = _bits(run, file.read_bytes())
    assert progress[0]["new_bits_per_byte"] == pytest.approx(bits[:99].mean().item(), abs=1e-6)
    assert progress[1]["new_bits_per_byte"] == pytest.approx(bits[99:199].mean().item(), abs=1e-6)
    assert progress[1]["bits_per_byte"] == pytest.approx(bits[:199].mean().item(), abs=1e-6)
    assert last["kind"] == "result" and last["bits_per_byte"] == result.bits_per_byte
    assert [decade["bytes"] for decade in last["decades"]] == [9, 90, 900, 234]
    table = format_table(result).splitlines()
    assert table[1].split() == ["0", "to", "9", "9", f"{result.decades[0][1]:.4f}"]
    assert table[4].startswith("1,000 to 9,999") and table[5].startswith("all but the first")


def test_a_stream_is_never_overwritten_nor_gone_on_with_as_another(
    read: Read, file: Path, tmp_path: Path, run: Path
) -> None:
    with pytest.raises(ValueError, match="holds no stream"):
        read(resume=True)
    read({"tokens": 300})
    with pytest.raises(ValueError, match="already holds a stream: expected another folder, or --resume"):
        read()
    other = make_run(tmp_path / "other", seed=1)
    before = (tmp_path / "out" / "state.safetensors").read_bytes()
    for changes, message in (
        ({"run": str(other)}, "is not the one that has read so far"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
        ({"tokens": 200}, "tokens=200: 300 bytes are read already"),
        ({"data": (str(file), str(file))}, "the data are not those of the saved stream"),
    ):
        with pytest.raises(ValueError, match=message):
            read(changes, resume=True)
    assert (tmp_path / "out" / "state.safetensors").read_bytes() == before
    assert read({"chunk": 99}, resume=True).finished


@pytest.mark.parametrize("damage", [lambda x: x[:-10], lambda x: x[:-1] + bytes([x[-1] ^ 1]), lambda x: b"text"])
def test_a_damaged_state_is_refused_and_left(damage: Callable[[bytes], bytes], read: Read, tmp_path: Path) -> None:
    read({"tokens": 300})
    state = tmp_path / "out" / "state.safetensors"
    state.write_bytes(broken := damage(state.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        read(resume=True)
    assert state.read_bytes() == broken


def test_a_changed_position_is_found(read: Read, tmp_path: Path) -> None:
    read({"tokens": 300})
    state = tmp_path / "out" / "state.safetensors"
    content = state.read_bytes()
    state.write_bytes(content.replace(rb"\"position\": 300", rb"\"position\": 200"))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read(resume=True)
    with safe_open(state, "pt") as opened:
        progress = opened.metadata()["progress"]
    tensors = load_file(state)
    metadata = {"format": "longnet-stream-state-1", "progress": progress, "digest": digest_tensors(tensors)}
    save_file(tensors, state, metadata=metadata)
    with pytest.raises(CheckpointError, match="its position is 200, and its cache's 300"):
        read(resume=True)
    save_file(tensors, state, metadata={**metadata, "progress": progress.replace("200", "300")})
    assert read({"tokens": 300}, resume=True).position == 300


def test_a_failed_write_leaves_the_state_before(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read({"tokens": 300})
    state = tmp_path / "out" / "state.safetensors"
    before = state.read_bytes()

    def fail(*arguments: object, **named: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("longnet.training.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        read(resume=True)
    assert state.read_bytes() == before


def test_models_that_cannot_stream_are_refused_before_anything_is_made(read: Read, tmp_path: Path) -> None:
    biased = make_run(tmp_path / "biased", use_xpos=False, use_rel_pos_bias=True)
    with pytest.raises(ValueError, match="use_rel_pos_bias=True"):
        read({"run": str(biased)})
    words = make_run(tmp_path / "words", vocab_size=300)
    with pytest.raises(ValueError, match="vocab_size=300 in the model: expected 256"):
        read({"run": str(words)})
    broken = make_run(tmp_path / "broken")
    model = load_model(broken)
    torch.nn.init.constant_(model.norm.weight, math.inf)
    from longnet.training.folder import RunFolder

    RunFolder(broken).write_model(model)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected finite numbers from the model"):
        read({"run": str(broken)})
    # The corrected stream is a new one.
    assert not (tmp_path / "out").exists()
    assert read({"tokens": 300}).position == 300


def test_a_reader_that_was_interrupted_half_way_refuses_to_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache has read the bytes, its sums lack them."""
    content = torch.arange(60) * 7 % 256
    with torch.inference_mode():
        reader = StreamReader(load_model(run))
        reader.read(content[:20])
        saved = {name: x.clone() for name, x in reader.state_dict().items()}
        with monkeypatch.context() as patch:
            patch.setattr(reader, "_add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reader.read(content[20:40])
        with pytest.raises(ValueError, match="reader counted 20 bytes and its cache read 40"):
            reader.read(content[20:])
        with pytest.raises(ValueError, match="an earlier read raised half-way"):
            reader.state_dict()
        reader.load_state_dict(saved)
        reader.read(content[20:])
        whole = StreamReader(load_model(run))
        whole.read(content)
    assert reader.nats() == pytest.approx(whole.nats(), rel=1e-6)
