"""Reading, splitting and drawing bytes; test_training_tokens.py has the rest."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from longnet.reading.source import FileBytes
from longnet.training.data import (
    TokensOnDisk,
    check_lengths,
    cut_windows,
    draw_windows,
    list_files,
    read_corpus,
    sources,
)
from longnet.training.data import (
    preparation as prepared,
)
from longnet.training.data.listing import is_held_out, standard_library


def test_a_folder_is_its_files_in_sorted_order_split_by_file(text_folder: Path) -> None:
    corpus = read_corpus(text_folder)
    names = sorted(path.relative_to(text_folder).as_posix() for path in text_folder.glob("*/*.txt"))
    held = [name for name in names if is_held_out(name)]
    kept = [name for name in names if not is_held_out(name)]
    assert 0 < len(held) < 12
    assert corpus.train[:].tobytes() == b"".join((text_folder / name).read_bytes() for name in kept)
    assert corpus.held_out[:].tobytes() == b"".join((text_folder / name).read_bytes() for name in held)
    assert (corpus.train_documents, corpus.held_out_documents) == (len(kept), len(held))


def test_the_side_of_a_file_does_not_depend_on_the_others(text_folder: Path) -> None:
    before = read_corpus(text_folder)
    (text_folder / "zz.txt").write_text("one more")
    after = read_corpus(text_folder)
    assert before.held_out[:].tobytes() in after.held_out[:].tobytes()
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_sees_one_changed_byte_and_where_documents_begin_but_no_names(
    text_folder: Path, tmp_path: Path
) -> None:
    before = read_corpus(text_folder).fingerprint
    moved = text_folder.rename(tmp_path / "moved")
    assert read_corpus(moved).fingerprint == before
    file = moved / "a" / "01.txt"
    content = file.read_bytes()
    file.write_bytes(b"L" + content[1:])
    changed = read_corpus(moved).fingerprint
    file.write_bytes(content[:-9])
    following = moved / "a" / "03.txt"
    assert not is_held_out("a/01.txt") and not is_held_out("a/03.txt")
    following.write_bytes(content[-9:] + following.read_bytes())
    joined = read_corpus(moved)
    assert joined.train[:].tobytes().count(content) == 1 and len({before, changed, joined.fingerprint}) == 3


def test_one_file_is_split_at_its_last_tenth(tmp_path: Path) -> None:
    file = tmp_path / "one.dat"
    file.write_bytes(bytes(range(250)) * 4)
    corpus = read_corpus(file)
    assert corpus.train[:].tobytes() + corpus.held_out[:].tobytes() == file.read_bytes()
    assert corpus.held_out.size == 100


def test_two_files_are_always_split(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).write_text(f"text of {name}")
    corpus = read_corpus(tmp_path)
    assert (corpus.train_documents, corpus.held_out_documents) == (1, 1)


@pytest.mark.parametrize("files", [0, 1])
def test_a_folder_of_less_than_two_files_is_refused(tmp_path: Path, files: int) -> None:
    for number in range(files):
        (tmp_path / str(number)).write_text("text")
    with pytest.raises(ValueError, match=rf"holds {files} non-empty file"):
        read_corpus(tmp_path)


def test_missing_and_too_small_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        read_corpus(tmp_path / "nothing")
    small = tmp_path / "small"
    small.write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="holds 10 bytes"):
        read_corpus(small)


def test_the_default_is_the_standard_library_without_tests() -> None:
    lines: list[str] = []
    corpus = read_corpus(None, lines.append)
    assert corpus.source == str(standard_library())
    assert 4_000_000 < corpus.train.size < 40_000_000
    assert 0.03 < corpus.held_out.size / corpus.train.size < 0.15
    whole = corpus.train[:].tobytes() + corpus.held_out[:].tobytes()
    assert (standard_library() / "json" / "decoder.py").read_bytes() in whole
    assert b"class BaseTaskTests" not in whole  # test/test_asyncio/test_tasks.py
    assert str(standard_library()) in lines[0]


def _links(root: Path) -> list[str]:
    """Links and what is no file, below a folder with two files; what is to be said of them."""
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.txt").write_text("first")
    (root / "z.txt").write_text("second")
    (root.parent / "other" / "deep").mkdir(parents=True)
    (root.parent / "other" / "deep" / "b.txt").write_text("third")
    (root / "link").symlink_to(root.parent / "other")
    (root / "again").symlink_to(root / "real")
    (root.parent / "other" / "loop").symlink_to(root)
    (root / "file.txt").symlink_to(root / "z.txt")
    (root / "broken").symlink_to(root / "gone")
    (root / "self").symlink_to(root / "self")
    (root / "device").symlink_to("/dev/null")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "socket"))
    return [
        f"Not read: {root / 'broken'} is a broken link (No such file or directory)",
        f"Not read: {root / 'device'} is a device",
        f"Not read: {root / 'pipe'} is a pipe",
        f"Not read: {root / 'self'} is a broken link (Too many levels of symbolic links)",
        f"Not read: {root / 'socket'} is a socket",
        f"Not read: {root / 'again'} is a link to a folder that is read already",
        f"Not read: {root / 'link' / 'loop'} is a link to a folder that is read already",
        f"Not read: 1 name of a file that is read already under another name, such as {root / 'file.txt'}",
    ]


def test_links_are_followed_and_what_is_not_read_is_named(tmp_path: Path) -> None:
    expected = _links(tmp_path / "data")
    said: list[str] = []
    assert list_files(tmp_path / "data", say=said.append) == ["link/deep/b.txt", "real/a.txt", "z.txt"]
    assert said == expected
    said.clear()
    corpus = read_corpus(tmp_path / "data", said.append)
    assert corpus.train_documents + corpus.held_out_documents == 3
    assert said == [f"Reading the folder {tmp_path / 'data'}", *expected]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_file_of_several_names_counts_once(text_folder: Path, link: Callable[[Path, Path], None]) -> None:
    before, names = read_corpus(text_folder), list_files(text_folder)
    (text_folder / "c").mkdir()
    for number in range(40):
        link(text_folder / "c" / f"{number:02d}.txt", text_folder / ("a" if number % 2 else "b") / f"{number:02d}.txt")
    said: list[str] = []
    assert list_files(text_folder, say=said.append) == names
    assert said == [
        f"Not read: 40 names of files that are read already under another name, such as {text_folder / 'c' / '00.txt'}"
    ]
    assert read_corpus(text_folder).fingerprint == before.fingerprint


def test_a_link_does_not_rename_a_file(tmp_path: Path) -> None:
    """Which part a file is in depends on its name: a link that sorts before it must not change it."""
    (tmp_path / "data").mkdir()
    for name in ("y.txt", "z.txt", "../outside.txt"):
        (tmp_path / "data" / name).write_text(name)
    for name, target in (("a.txt", "z.txt"), ("c.txt", "../outside.txt"), ("b.txt", "../outside.txt")):
        (tmp_path / "data" / name).symlink_to(target)
    assert list_files(tmp_path / "data") == ["b.txt", "y.txt", "z.txt"]


def test_a_stream_follows_links_too(tmp_path: Path) -> None:
    expected = _links(tmp_path / "data")
    said: list[str] = []
    source = FileBytes([str(tmp_path / "data")], said.append)
    assert (source.files, source.total, said) == (3, 16, expected)


def test_a_file_without_permission_is_named(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = text_folder / "a" / "01.txt"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret)
    said: list[str] = []
    assert "a/01.txt" not in list_files(text_folder, say=said.append)
    assert said == [f"Not read: there is no permission to read {secret}"]


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is a pipe or a device: expected a file or a folder"):
        read_corpus(tmp_path / "pipe")


def test_prepared_tokens_that_become_fewer_are_an_error_and_no_signal(tmp_path: Path) -> None:
    file = tmp_path / "one.dat"
    file.write_bytes(bytes(range(256)) * 80)
    corpus = read_corpus(file, folder=tmp_path / "data")
    before = draw_windows(corpus.train, 100, 8, seed=0, step=1)
    file.unlink()
    assert torch.equal(draw_windows(corpus.train, 100, 8, seed=0, step=1)[0], before[0])
    os.truncate(tmp_path / "data" / "train.tokens", 30)
    with pytest.raises(ValueError, match=r"train\.tokens has become shorter while it was read: .* with --resume"):
        draw_windows(corpus.train, 100, 8, seed=0, step=1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_file_is_sliced_as_an_array(tmp_path: Path, dtype: str) -> None:
    array = np.arange(200, dtype=dtype) * (1 if dtype == "uint8" else 300)
    array.tofile(tmp_path / "one")
    part = TokensOnDisk(tmp_path / "one", dtype)
    for place in (slice(3, 9), slice(None), slice(-5, None), slice(100, 999), slice(9, 3)):
        assert np.array_equal(part[place], array[place])
    assert part.size == 200 and np.array_equal(np.asarray(part), array) and np.asarray(part).dtype == dtype
    with pytest.raises(ValueError, match="step=2"):
        part[::2]


@pytest.mark.parametrize("single", [True, False])
def test_reading_for_long_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool) -> None:
    """With a clock by which a batch takes a second."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(bytes(1500))
    if not single:
        (tmp_path / "data" / "b.txt").write_bytes(bytes(100))
    clock = itertools.count()
    monkeypatch.setattr(prepared, "_CHUNK", 100)
    monkeypatch.setattr(sources, "_PIECE", 100)
    monkeypatch.setattr(prepared.time, "monotonic", lambda: float(next(clock)))
    said: list[str] = []
    corpus = read_corpus(tmp_path / "data" / "a.txt" if single else tmp_path / "data", said.append)
    assert corpus.train.size + corpus.held_out.size == (1500 if single else 1600)
    total = "1,500" if single else "1,600"
    lines = [line for line in said if line.startswith("Prepared")]
    assert lines[:2] == [f"Prepared {count} of {total} bytes" for count in ("200", "600")] and len(lines) < 6


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.find_source(text_folder, "text", lambda line: None)
    monkeypatch.setattr(sources, "_PIECE", 50)
    pieces = source.pieces()
    next(pieces)
    os.truncate(text_folder / "b" / "38.txt", 0)
    with pytest.raises(ValueError, match=r"38\.txt has become shorter while it was read"):
        list(pieces)


def test_a_held_out_part_of_one_byte_predicts_nothing(text_folder: Path) -> None:
    corpus = read_corpus(text_folder)
    check_lengths(corpus, 64)
    with pytest.raises(ValueError, match=r"has 1 held-out token\(s\) in 3 document\(s\): expected at least 2"):
        check_lengths(dataclasses.replace(corpus, held_out=corpus.held_out[:1], held_out_documents=3), 64)


def test_windows_depend_on_seed_and_step_alone_and_targets_follow_tokens() -> None:
    stream = np.arange(5000, dtype=np.uint16).astype(np.uint8)
    tokens, targets = draw_windows(stream, 16, 4, seed=3, step=7)
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal((tokens[:, -1] + 1) % 256, targets[:, -1])
    assert torch.equal(tokens, draw_windows(stream, 16, 4, seed=3, step=7)[0])
    assert not torch.equal(tokens, draw_windows(stream, 16, 4, seed=3, step=8)[0])
    assert not torch.equal(tokens, draw_windows(stream, 16, 4, seed=4, step=7)[0])


def test_window_starts_are_fixed_for_all_time() -> None:
    stream = np.arange(256, dtype=np.uint8)
    assert draw_windows(stream, 1, 4, seed=1, step=1)[0].flatten().tolist() == [50, 76, 89, 68]


def test_windows_reach_both_ends_of_the_stream() -> None:
    stream = np.arange(10, dtype=np.uint8)
    starts = draw_windows(stream, 7, 200, seed=0, step=1)[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="context=8 needs 9 tokens in a row: the training data holds 8"):
        draw_windows(np.zeros(8, dtype=np.uint8), 8, 1, seed=0, step=1)


def test_cut_windows() -> None:
    tokens, targets = cut_windows(np.arange(9, dtype=np.uint8), 3, np.array([0, 5]))
    assert tokens.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3], [6, 7, 8]]
