"""Reading, splitting and drawing bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longnet.training.data import cut_windows, draw_windows, is_held_out, read_corpus, standard_library


def test_a_folder_is_its_files_in_sorted_order_split_by_file(text_folder: Path) -> None:
    corpus = read_corpus(text_folder)
    names = sorted(path.relative_to(text_folder).as_posix() for path in text_folder.glob("*/*.txt"))
    held = [name for name in names if is_held_out(name)]
    kept = [name for name in names if not is_held_out(name)]
    assert 0 < len(held) < 12
    assert corpus.train.tobytes() == b"".join((text_folder / name).read_bytes() for name in kept)
    assert corpus.held_out.tobytes() == b"".join((text_folder / name).read_bytes() for name in held)
    assert (corpus.train_files, corpus.held_out_files) == (len(kept), len(held))


def test_the_side_of_a_file_does_not_depend_on_the_others(text_folder: Path) -> None:
    before = read_corpus(text_folder)
    (text_folder / "zz.txt").write_text("one more")
    after = read_corpus(text_folder)
    assert before.held_out.tobytes() in after.held_out.tobytes()
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_sees_one_changed_byte_and_a_rename_but_not_the_place(
    text_folder: Path, tmp_path: Path
) -> None:
    before = read_corpus(text_folder).fingerprint
    moved = text_folder.rename(tmp_path / "moved")
    assert read_corpus(moved).fingerprint == before
    file = moved / "a" / "01.txt"
    content = file.read_bytes()
    file.write_bytes(b"L" + content[1:])
    changed = read_corpus(moved).fingerprint
    file.write_bytes(content)
    file.rename(moved / "a" / "01x.txt")
    assert len({before, changed, read_corpus(moved).fingerprint}) == 3


def test_one_file_is_split_at_its_last_tenth(tmp_path: Path) -> None:
    file = tmp_path / "one.bin"
    file.write_bytes(bytes(range(250)) * 4)
    corpus = read_corpus(file)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == file.read_bytes()
    assert corpus.held_out.size == 100


def test_two_files_are_always_split(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).write_text(f"text of {name}")
    corpus = read_corpus(tmp_path)
    assert (corpus.train_files, corpus.held_out_files) == (1, 1)


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
    whole = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert (standard_library() / "json" / "decoder.py").read_bytes() in whole
    assert b"class BaseTaskTests" not in whole  # test/test_asyncio/test_tasks.py
    assert str(standard_library()) in lines[0]


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
    with pytest.raises(ValueError, match="context=8 needs 9 bytes in a row: the training data holds 8"):
        draw_windows(np.zeros(8, dtype=np.uint8), 8, 1, seed=0, step=1)


def test_cut_windows() -> None:
    tokens, targets = cut_windows(np.arange(9, dtype=np.uint8), 3, np.array([0, 5]))
    assert tokens.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3], [6, 7, 8]]
