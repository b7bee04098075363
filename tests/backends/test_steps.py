"""Steps are made once for a key, and repeated on the tensors of each call."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from compiled import words_of

from longnet import dilated_attention
from longnet.attention.backends.triton import backend, steps
from longnet.attention.backends.triton.backend import STEPS
from longnet.attention.backends.triton.steps import Fill, Lookup, RepeatedSteps


class Double:
    """Adds a tensor to the others."""

    def announce(self, tensors) -> None:
        tensors["twice"] = tensors["x"].to("meta")

    def run(self, tensors) -> None:
        tensors["twice"] = 2 * tensors["x"]


class Copy:
    def announce(self, tensors) -> None:
        pass

    def run(self, tensors) -> None:
        tensors["y"].copy_(tensors["twice"])


def test_steps_are_made_once_and_repeated_on_other_tensors() -> None:
    repeated, made = RepeatedSteps(2), []

    def make(tensors):
        def steps():
            yield Double()
            # What the step before will add is known.
            made.append(tensors["twice"].is_meta)
            yield Copy()

        return steps

    for number in (3.0, 4.0):
        tensors = {"x": torch.full((2,), number), "y": torch.full((2,), torch.nan)}
        repeated.run("a", tensors, make(tensors))
        assert tensors["y"].tolist() == [2 * number] * 2
    assert made == [True]


@pytest.mark.parametrize("when", ["made", "run"])
def test_steps_that_failed_are_made_again(when) -> None:
    repeated, tensors = RepeatedSteps(2), {"x": torch.empty(2)}

    def failing():
        yield Fill("x", 1.0)
        if when == "made":
            raise MemoryError
        # There is no such tensor.
        yield Fill("y", 1.0)

    with pytest.raises(MemoryError if when == "made" else KeyError):
        repeated.run("a", tensors, failing)
    repeated.run("a", tensors, lambda: iter([Fill("x", 2.0)]))
    assert tensors["x"].tolist() == [2.0, 2.0]


def test_the_oldest_are_forgotten() -> None:
    repeated, made = RepeatedSteps(2), []
    for key in "abcab":
        repeated.run(key, {}, lambda key=key: iter(made.append(key) or ()))
    assert "".join(made) == "abcab"
    repeated.run("b", {}, lambda: pytest.fail("made again"))


def test_the_newest_is_the_last_to_be_forgotten() -> None:
    repeated, made = RepeatedSteps(2), []

    def make(key):
        made.append(key)
        yield Fill("x", float(ord(key)))

    # Run again and again, then one that was not the newest.
    for key in "aabbabbac":
        tensors = {"x": torch.empty(1)}
        repeated.run(key, tensors, lambda key=key: make(key))
        assert tensors["x"].item() == ord(key)
    assert "".join(made) == "abc"
    repeated.run("a", {"x": torch.empty(1)}, lambda: pytest.fail("made again"))
    repeated.clear()
    repeated.run("a", {"x": torch.empty(1)}, lambda: make("a"))
    assert "".join(made) == "abca"


def test_tensors_of_shapes_alone_are_asked_for_in_every_call() -> None:
    repeated, asked = RepeatedSteps(2), []

    def look_up():
        asked.append(len(asked))
        return torch.tensor(asked[-1])

    for _ in range(3):
        tensors = {}
        repeated.run("a", tensors, lambda: iter([Lookup("order", look_up)]))
        assert tensors["order"] == asked[-1]
    # The first is there for what is made after it.
    assert asked == [0, 1, 2, 3]


@pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no GPU: with one, kernels are compiled",
)
def test_calls_that_differ_in_anything_have_steps_of_their_own() -> None:
    def call(query, key, value, **options):
        dilated_attention(query, key, value, (8, 16), (1, 2), backend="triton", **options)
        return len(STEPS._steps)

    query, key, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    assert [call(query, key, value), call(value, key, query)] == [1, 1]
    transposed = torch.randn(1, 16, 2, 16).transpose(1, 2)
    room = torch.randn(1, 2, 16, 20)
    counts = [
        call(query, key, value, is_causal=True),
        call(query, key, value, scale=0.3),
        call(query, key, value, key_padding_mask=torch.zeros(1, 16, dtype=torch.bool)),
        call(transposed, key, value),
        call(query, transposed, value),
        # Other strides, then another alignment.
        call(query, key, room[..., :16]),
        call(query, key, room[..., 1:17]),
        call(query.bfloat16(), key.bfloat16(), value.bfloat16()),
        call(query[..., :8, :], key[..., :8, :], value[..., :8, :]),
        call(query, key, value, segment_offset=3),
        call(query, key, value, segment_offset=torch.tensor([3])),
    ]
    assert counts == list(range(2, 2 + len(counts)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "beyond"), [(4, 4, {}), (4, 2, {"window": 16}), (3, 3, {"segment_offset": 5})]
)
def test_kernels_of_the_backward_pass_are_compiled_with_those_of_the_forward(
    heads, kv_heads, beyond, monkeypatch
) -> None:
    compiled = []

    def record(launches):
        forms = lambda pointers: [(x.shape, x.stride(), x.dtype) for x in pointers]  # noqa: E731
        compiled.append([(one.kernel, one.rest, one.options, forms(pointers)) for one, pointers, _ in launches])

    monkeypatch.setattr(steps, "compile_together", record)
    monkeypatch.setattr(backend, "STEPS", RepeatedSteps(8))
    # Odd lengths, so that none of these kernels is another test's.
    drawn = [torch.randn(1, count, 61, 16, requires_grad=True) for count in (heads, kv_heads, kv_heads)]
    call = partial(dilated_attention, segment_lengths=(16, 64), dilation_rates=(1, 2), is_causal=True, **beyond)
    out = call(*drawn, backend="triton")
    out.backward(torch.randn_like(out))
    both, after = compiled
    assert after and all(one in both for one in after)
    # Where nothing is trained, nothing of it is compiled.
    call(*(x.detach()[:, :, :60] for x in drawn), backend="triton")
    assert len(compiled) == 3 and len(compiled[2]) == len(both) - len(after)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_another_length_compiles_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lengths = ("256", "251", "144", "130", "1040")
    rows = words_of(Path(__file__).parent / "launch_compile.py", *lengths)
    assert [row[0] for row in rows] == list(lengths)
    # Rows of both levels forward, for keys and for queries, and what comes before the two.
    assert {(row[1], row[2]) for row in rows} == {("7", "7")}
