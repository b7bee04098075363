"""Data prepared by several processes are those prepared by one, and no process stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longnet.training.data import Corpus, preparation, read_corpus, read_tokenizer, sources, train_tokenizer, workers

pytest.importorskip("tokenizers")
TEXT = Path(preparation.__file__).read_text(encoding="utf-8")
# What a cut could break: long characters, white space of other scripts, tokens of their own, bytes that are not UTF-8.
HARD = [
    TEXT.encode() * 3,
    ("été\u3000中文。\n" * 600).encode(),
    b"x" * 9000,
    (TEXT[:3000] + "<|endoftext|> a<|endoftext|>b\n").encode() * 4,
    b"\xff\xfea b\xc3\n" * 900,
    ("中\n\u3000" * 900).encode(),  # No place to cut, but in the middle of U+3000 it seems one.
    *(TEXT[number : number + 300].encode() for number in range(0, 6000, 100)),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(HARD):
        (folder / f"{number}.txt").write_bytes(text)
    train_tokenizer([TEXT.encode()], 600).save(tmp_path)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Two processes for any text, tasks of 2,000 bytes, batches of 20,000, and pieces of 8,000; the processes that started."""
    for module, name, value in (
        (workers, "_TASK", 2000),
        (workers, "_FIRST", 0),
        (preparation, "_CHUNK", 20_000),
        (sources, "_PIECE", 8000),
        (workers, "count_workers", lambda: 2),
    ):
        monkeypatch.setattr(module, name, value)
    processes: list[subprocess.Popen[bytes]] = []
    start = workers.Workers._start

    def noted(self: workers.Workers) -> subprocess.Popen[bytes]:
        processes.append(start(self))
        return processes[-1]

    monkeypatch.setattr(workers.Workers, "_start", noted)
    return processes


def facts(corpus: Corpus) -> tuple[object, ...]:
    described = corpus.describe()
    return tuple(described.values()), corpus.train[:].tobytes(), corpus.held_out[:].tobytes()


def test_tokens_are_those_of_one_process(
    data: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = read_corpus(data, tokenizer=str(data.parent))
    found = facts(corpus)
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    assert corpus.lost["replaced_characters"] > 900
    monkeypatch.setattr(workers, "count_workers", lambda: 0)
    assert facts(read_corpus(data, tokenizer=str(data.parent))) == found and len(started) == 2


def test_parts_are_the_text_and_cut_no_character(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_TASK", 2000)
    tokenizer = read_tokenizer(data.parent)
    with workers.Workers(tokenizer) as encoder:
        parts = [encoder._cut(text) for text in HARD]
    assert [b"".join(one) for one in parts] == HARD
    assert [len(one) > 1 for one in parts[:6]] == [True, True, False, True, True, False]
    for text, cut in zip(HARD, parts, strict=True):
        whole = np.concatenate(list(tokenizer.encode([text])))
        assert np.array_equal(np.concatenate(list(tokenizer.encode(cut))), whole)


def test_little_text_and_bytes_start_no_process(
    data: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_corpus(data)
    monkeypatch.setattr(workers, "_FIRST", 1 << 22)
    read_corpus(data, tokenizer=str(data.parent))
    assert not started


def test_workers_are_as_many_as_the_cpus_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, count in ((1, 0), (2, 2), (3, 3), (64, 8)):
        monkeypatch.setattr(workers.os, "sched_getaffinity", lambda number, cpus=cpus: set(range(cpus)), raising=False)
        assert workers.count_workers() == count


def test_an_error_of_a_process_is_raised_as_by_one(
    data: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """WordPiece without its unknown token."""
    import tokenizers as library

    made = library.Tokenizer(library.models.WordPiece({"a": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.save(str(data.parent / "tokenizer.json"))
    (data.parent / "tokenizer_config.json").unlink()
    errors = []
    for count in (2, 0):
        monkeypatch.setattr(workers, "count_workers", lambda count=count: count)
        with pytest.raises(Exception, match="WordPiece error: Missing") as raised:
            read_corpus(data, tokenizer=str(data.parent))
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1] and 1 <= len(started) <= 2
    assert all(process.returncode is not None for process in started)


def test_a_lost_process_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch, started: list[object]) -> None:
    start = workers.Workers._start

    def killed(self: workers.Workers) -> subprocess.Popen[bytes]:
        process = start(self)
        process.kill()
        return process

    monkeypatch.setattr(workers.Workers, "_start", killed)
    with pytest.raises(ChildProcessError, match="turns text into tokens is gone"):
        read_corpus(data, tokenizer=str(data.parent))


def test_ctrl_c_ends_all(data: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation.Preparation, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        read_corpus(data, tokenizer=str(data.parent))
    assert len(started) == 2 and all(process.returncode is not None for process in started)


# As a user may write it: no ``if __name__ == "__main__"``. It kills itself before it writes the third batch.
SCRIPT = """
import os, signal, sys
print("begins", flush=True)
from longnet.training.data import preparation, read_corpus, workers
workers._TASK, workers._FIRST, preparation._CHUNK, workers.count_workers = 2000, 0, 20_000, lambda: 2
start, write, batches = workers.Workers._start, preparation.Preparation._write, []
def noted(self):
    process = start(self)
    # At once: processes are started from several threads.
    os.write(1, b"%d\\n" % process.pid)
    return process
def killed(self, *given):
    batches.append(1)
    if len(batches) > 2 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *given)
workers.Workers._start, preparation.Preparation._write = noted, killed
read_corpus(sys.argv[2], print, tokenizer=sys.argv[3], folder=sys.argv[4])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_preparation_leaves_no_process_and_goes_on(data: Path) -> None:
    whole = read_corpus(data, tokenizer=str(data.parent))
    script, folder = data.parent / "script.py", data.parent / "prepared"
    script.write_text(SCRIPT)

    def run(how: str) -> tuple[int, list[str]]:
        command = [sys.executable, str(script), how, str(data), str(data.parent), str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
        return done.returncode, done.stdout.splitlines()

    code, lines = run("kill")
    numbers = [int(line) for line in lines if line.isdigit()]
    assert code == -9 and len(numbers) == 2 and lines.count("begins") == 1
    deadline = time.monotonic() + 30
    while (left := [number for number in numbers if is_alive(number)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert json.loads((folder / "unfinished.json").read_text())["pieces"] > 0
    code, lines = run("go on")
    assert code == 0 and any(line.startswith("Going on after") for line in lines)
    again = read_corpus(data, tokenizer=str(data.parent), folder=folder)
    assert facts(again) == facts(whole)


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_takes_no_torch() -> None:
    code = workers._CODE.format(sys.path).replace("work()", "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
