"""What the Hopper kernels take, and how tensors are brought into their shape; the kernels themselves need a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import pad

from longnet.attention.backends.triton import hopper
from longnet.attention.backends.triton.bands import band_launches
from longnet.attention.backends.triton.hopper_bands import BandWork
from longnet.attention.backends.triton.padding import CountPadding, count_padding
from longnet.attention.backends.triton.steps import RepeatedSteps, Run
from longnet.geometry import Pattern
from longnet.geometry.nests import make_nests
from longnet.runtime import triton_internals
from longnet.runtime.tma import is_matrix, view_of

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs triton, and no GPU: with one, kernels are compiled",
)


def split(lengths, rates, length, heads=4, head_offsets="interleaved"):
    nests = make_nests(Pattern.parse(lengths, rates, head_offsets), heads, hopper.UNIT, 64)
    ours, reasons = hopper.split_nests(nests, length)
    assert {*ours, *(nest for nest, _ in reasons)} == set(nests)
    return [nest.dilation_rates for nest in ours], [reason for _, reason in reasons]


def test_any_length_is_taken_when_filling_it_up_takes_little() -> None:
    lengths, rates = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
    for length in (10_001, 45_681, 1_000_001):
        assert split(lengths, rates, length, 16, "blocked") == ([(1, 4), (2,), (8,), (16,)], [])


def test_rates_without_a_small_common_multiple_are_not_filled_up_together() -> None:
    ours, (reason,) = split((4000, 4001), (25, 27), 4099)
    assert ours == [(25,)]
    assert reason == "the length 4099 is no multiple of the rate 27, and filling it up would take too much"
    assert split((4000, 4001), (25, 27), 4050) == ([(25,), (27,)], [])


def test_short_segments_and_long_nests_are_not_taken() -> None:
    assert split((32, 2048), (1, 2), 4096)[1] == [
        "segments of 32 tokens at rate 1 are too short for blocks of 128 rows"
    ]
    lengths = tuple(64 * 64 * 2**i for i in range(6))
    ours, (reason,) = split(lengths, (1, 2, 4, 8, 16, 32), 1 << 20)
    assert ours == [] and reason == "they take nests of up to 5 branches, not 6"


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((2, 3, 96, 64), (0, 1, 2, 3), True),
        ((2, 96, 3, 64), (0, 2, 1, 3), True),
        # A length that the unit does not divide: another batch row starts in the middle of a matrix row.
        ((2, 3, 95, 64), (0, 1, 2, 3), False),
        ((2, 3, 96, 48), (0, 1, 2, 3), False),
        ((96, 2, 3, 64), (1, 2, 0, 3), False),
    ],
)
def test_which_tensors_are_matrices(shape, order, expected) -> None:
    x = torch.randn(shape, dtype=torch.float16).permute(order)
    assert is_matrix(x, 64, 16) is expected


def test_a_tensor_that_starts_off_a_boundary_is_no_matrix() -> None:
    room = torch.randn(1, 2, 32, 80, dtype=torch.float16)
    assert is_matrix(room[..., 8:72], 64, 16)
    assert not is_matrix(room[..., 4:68], 64, 16)


@interpreted
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels", "unit"), [(9, 48, 16), (130, 64, 4), (64, 33, 1), (63, 128, 64)])
def test_filling_up_is_padding_with_zeros(length, channels, unit, dtype, count) -> None:
    dim = 64 if channels <= 64 else 128
    tensors = []
    for number in range(count):
        # Strides of their own, and nothing that may be read around them.
        room = torch.full((2, length + 3, 4 + number, channels + 7), float("nan"), dtype=dtype)
        view = room[:, 2 : length + 2, number : 3 + number, 5 : channels + 5].transpose(1, 2)
        tensors.append(view.copy_(torch.randn(2, 3, length, channels)))
    for x, filled in zip(tensors, hopper.pad_for_tma(tensors, dim, unit), strict=True):
        assert torch.equal(filled, pad(x, (0, dim - channels, 0, -length % unit)))
        assert is_matrix(filled, dim, unit)
        assert view_of(filled).tokens % unit == 0


@interpreted
@pytest.mark.parametrize("count", [1, 2])
def test_padded_tokens_are_filled_with_zeros(count) -> None:
    tensors = [torch.randn(2, 3, 70, 48).half() for _ in range(count)]
    padded = torch.rand(2, 140)[:, ::2] < 0.3
    for x in tensors:
        x.masked_fill_(padded[:, None, :, None], torch.nan)
    for x, filled in zip(tensors, hopper.pad_for_tma(tensors, 64, 16, padded.view(torch.int8)), strict=True):
        assert torch.equal(filled, pad(x.masked_fill(padded[:, None, :, None], 0.0), (0, 16, 0, 10)))


@interpreted
@pytest.mark.parametrize("length", [1, 63, 64, 65, 640, 20_000])
def test_padding_is_counted_by_groups(length) -> None:
    masks = torch.rand(2, length) < 0.5, torch.zeros(2, length, dtype=torch.bool), torch.rand(length, 2).T < 0.1
    for mask in masks:
        tensors = {"padding": mask.view(torch.int8), "padding_counts": None}
        (step,) = count_padding(tensors)
        step.announce(tensors)
        announced = tensors["padding_counts"].shape
        step.run(tensors)
        groups = pad(mask.int(), (0, -length % 64)).unflatten(1, (-1, 64)).sum(2)
        assert torch.equal(tensors["padding_counts"], pad(groups.cumsum(1), (1, 0)).int())
        assert tensors["padding_counts"].shape == announced
        # Once for a call.
        assert not list(count_padding(tensors))
    assert not list(count_padding({"padding": None}))


def by_name(kernel, arguments, options):
    """Arguments of a call by the names of the kernel's parameters and of its constants."""
    call = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    return call | vars(call.pop("C"))


class Recorder:
    """In place of a kernel: what it was called with, see :func:`by_name`."""

    def __init__(self, kernel) -> None:
        self.arg_names, self.calls, self.quick = kernel.arg_names, [], []

    def warmup(self, *arguments, grid, **options):
        self.calls.append((grid, by_name(self, arguments, options)))
        return Compiled(self)


class Compiled:
    # Triton's launcher; none whose C function is called in its place.
    run = None

    def __init__(self, recorder) -> None:
        self.recorder = recorder

    def __getitem__(self, grid):
        def again(*arguments):
            assert len(arguments) == len(self.recorder.arg_names)
            self.recorder.quick.append((grid, by_name(self.recorder, arguments, {})))

        return again


class Kernels(dict):
    """Recorders by name, and the schedules whose order was asked for."""

    def __init__(self, recorders) -> None:
        super().__init__(recorders)
        self.schedules = set()

    def order(self, schedule):
        # Where the call is, not where copies are announced.
        assert schedule.device.type == "cpu"
        self.schedules.add(schedule)
        return torch.arange(schedule.items, dtype=torch.int32)


@pytest.fixture
def kernels(monkeypatch):
    """The three kernels as recorders, on a device of four multiprocessors whose items come in their own order."""
    pytest.importorskip("triton.experimental.gluon")
    STEPS.clear()
    recorders = {}
    for name in ("forward", "key_value", "query"):
        kernel, owned = hopper._kernel(name)
        recorders[name] = Recorder(kernel), owned
    found = Kernels((name, recorder) for name, (recorder, _) in recorders.items())
    monkeypatch.setattr(hopper, "_kernel", recorders.__getitem__)
    # Compiled for the call's own numbers, so that one record holds tensors and numbers.
    monkeypatch.setattr(triton_internals, "_typical", triton_internals._plain)
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(hopper, "cached_order", found.order)
    monkeypatch.setattr(hopper, "pad_for_tma", lambda tensors, dim, unit, padding=None: [
        pad(x if padding is None else x * (padding == 0)[:, None, :, None], (0, dim - x.shape[-1], 0, -x.shape[2] % unit))
        for x in tensors
    ])  # fmt: skip
    return found


# As it is where the fixture below has not replaced it.
TYPICAL = triton_internals._typical
# What the calls below have written down, by their arguments.
STEPS = RepeatedSteps(16)


def call_both(length, dim, kv_heads=4, pattern=((256, 1024), (1, 2)), is_causal=True, padding=None):
    heads, batch = 4, 2
    work = hopper.Work(make_nests(Pattern.parse(*pattern), heads, hopper.UNIT, 64), 0.5, is_causal, "interleaved")
    query, grad = (torch.randn(batch, length, heads, dim).half().transpose(1, 2) for _ in range(2))
    key, value = (torch.randn(batch, length, kv_heads, dim).half().transpose(1, 2) for _ in range(2))
    out, grad_q, grad_k, grad_v = (torch.empty_like(query) for _ in range(4))
    lse, delta = (torch.empty(batch, heads, length) for _ in range(2))
    tensors = {"OUT": out, "LSE": lse, "DELTA": delta, "GRAD_Q": grad_q, "GRAD_K": grad_k, "GRAD_V": grad_v}
    inputs = {"q": query, "k": key, "v": value, "g": grad}
    named = {"q": query, "k": key, "v": value, "grad_out": grad, "out": out, "lse": lse, "row_lse": lse, "delta": delta}
    # The first kernel reads queries from the room that the second writes to.
    named |= {"queries": grad_q.copy_(query), "grad_k": grad_k, "grad_v": grad_v, "offsets": None}
    named |= {"padding": padding, "padding_counts": None}

    def steps():
        yield from work.forward(named)
        read = yield from work.key_value(named)
        yield from work.query(named, read)

    STEPS.run((length, dim, kv_heads, pattern, is_causal, padding is None), named, steps)
    return work, tensors, inputs


@pytest.mark.parametrize(("length", "dim", "kv_heads"), [(2048, 64, 4), (2047, 48, 2), (2047, 128, 1)])
@pytest.mark.parametrize("pattern", [((256, 1024), (1, 2)), ((300, 1024), (1, 3))])
def test_kernels_get_the_tensors_and_numbers_of_the_call(kernels, length, dim, kv_heads, pattern) -> None:
    work, tensors, inputs = call_both(length, dim, kv_heads, pattern)
    for name, recorder in kernels.items():
        _, owned = hopper._kernel(name)
        assert len(recorder.quick) == len(recorder.calls)
        assert {call["MERGE"] for _, call in recorder.calls} == set(range(len(work.nests)))
        done = 0
        for (programs, *_), call in recorder.calls:
            nest = work.nests[call["MERGE"]]
            rates = nest.dilation_rates
            assert [call[one] for one in ("length", "heads", "group", "scale")] == [length, 4, 4 // kv_heads, 0.5]
            assert (call["D"], call["CHANNELS"], call["CAUSAL"]) == (64 if dim <= 64 else 128, dim, True)
            assert call["NEST"][:2] == (nest.segment_lengths, rates)
            assert call["items"] == len(call["ORDER"]) >= programs and programs <= 4
            done += call["items"]
            for one in ("OUT", "LSE", "DELTA", "GRAD_Q", "GRAD_K", "GRAD_V"):
                if one in call:
                    assert call[one] is tensors[one]
                    assert call.get(f"{one.lower()}_at", tensors[one].stride()[:3]) == tensors[one].stride()[:3]
            absent = {"PADDING", "COUNTS", "padding_at"} & set(recorder.arg_names)
            assert not call["PADDED"] and all(call[one] is None for one in absent)
            letters = [one[0] for one in recorder.arg_names if one.endswith("_fold")]
            for place, letter in enumerate(letters):
                x = inputs[letter]
                views = [call[f"{letter}{i}"] for i in range(5)]
                assert views[len(rates) :] == [None] * (5 - len(rates))
                if letter == "q":
                    in_room = name == "key_value" and (length, dim) == (2048, 64) and pattern[1] == (1, 2)
                    assert (views[0].base is tensors["GRAD_Q"]) == in_room
                for rate, view in zip(rates, views, strict=False):
                    assert list(view.block_shape) == [call["M"] if place in owned else call["N"], call["D"]]
                    # A row of the matrix holds so many tokens, of which every one can be found by its fold.
                    matrix = view.base.as_strided(view.shape, view.strides)
                    for batch, head, token in ((0, 0, 0), (1, x.shape[1] - 1, length - 1), (1, 0, 7)):
                        by_batch, by_head, by_column, by_token = call[f"{letter}_fold"]
                        flat = batch * by_batch + head * by_head + token
                        column = flat % rate * by_token + head * by_column
                        found = matrix[flat // rate, column : column + dim]
                        assert torch.equal(found, x[batch, head, token])
        assert done == sum({schedule.nest: schedule.items for schedule in kernels.schedules}.values())


@pytest.mark.parametrize(("length", "dim", "kv_heads"), [(2048, 64, 4), (2047, 48, 2)])
def test_kernels_get_the_mask_and_copies_without_padding(kernels, monkeypatch, length, dim, kv_heads) -> None:
    counts = torch.empty(2, 33, dtype=torch.int32)
    monkeypatch.setattr(CountPadding, "run", lambda self, tensors: tensors.update(padding_counts=counts))
    padded = torch.rand(2, length) < 0.3
    padding = padded.view(torch.int8)
    _, _, inputs = call_both(length, dim, kv_heads, padding=padding)
    zeroed = {"forward": "v", "key_value": "k", "query": "k"}
    for name, recorder in kernels.items():
        for _, call in recorder.calls:
            assert call["PADDED"] and call["PADDING"] is padding and call["padding_at"] == padding.stride()
            assert call.get("COUNTS", counts).shape == counts.shape
            letter = zeroed[name]
            # A copy whose padded rows alone are 0.
            copy, x = call[f"{letter}0"].base, inputs[letter]
            assert torch.equal(copy[:, :, :length, :dim], x * ~padded[:, None, :, None])
            other = call["k0" if letter == "v" else "v0"].base
            assert torch.equal(other[:, :, :length, :dim], inputs["k" if letter == "v" else "v"])
        for _, call in recorder.quick:
            assert call.get("COUNTS", counts) is counts


def test_later_calls_get_the_same_without_tritons_dispatch(kernels) -> None:
    call_both(2047, 48)
    first = {name: list(recorder.calls) for name, recorder in kernels.items()}
    _, tensors, _ = call_both(2047, 48)
    for name, recorder in kernels.items():
        assert recorder.calls == first[name]
        again = recorder.quick[len(first[name]) :]
        for (grid, call), (earlier_grid, earlier) in zip(again, first[name], strict=True):
            assert grid == earlier_grid and call.keys() == earlier.keys() - {"num_warps", "maxnreg"}
            for one, value in call.items():
                if one in tensors:
                    assert value is tensors[one]
                elif isinstance(value, (int, float, str, tuple)):
                    assert value == earlier[one]
                elif value is not None:
                    assert type(value) is type(earlier[one])
    # Other settings are another kernel.
    call_both(2047, 48, is_causal=False)
    assert all(len(recorder.calls) > len(first[name]) for name, recorder in kernels.items())


def compiled_for(argument):
    """What Triton compiles a kernel for in an argument's place: ones, and which numbers are multiples of 16."""
    if isinstance(argument, tuple):
        return tuple(map(compiled_for, argument))
    if type(argument) is int:
        return 1 if argument == 1 else argument % 16 == 0
    return argument if isinstance(argument, (float, str, type(None))) else type(argument)


def launches_at(length, pattern=((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)), heads=12, window=None):
    """What the launches of a call are compiled for, by kernel."""
    made = {name: torch.empty(1, heads, length, 64, dtype=torch.float16) for name in ("q", "k", "v", "grad_out", "out")}
    made |= {name: torch.empty_like(made["q"]) for name in ("queries", "grad_k", "grad_v")}
    made |= {name: torch.empty(1, heads, length) for name in ("lse", *hopper.STATISTICS)}
    made |= dict.fromkeys(("offsets", "padding", "padding_counts"))

    def steps():
        if window is not None:
            (launch,) = band_launches(Pattern.compose(window=window), True)
            work = BandWork(launch, Pattern.compose(window=window), 0.5, True, 0, merge=False)
            yield from work.steps("forward", made, ("q", "k", "v"), ("out", "lse"))
            return
        work = hopper.Work(make_nests(Pattern.parse(*pattern), heads, hopper.UNIT, 64), 0.5, True, "interleaved")
        yield from work.forward(made)
        read = yield from work.key_value(made)
        yield from work.query(made, read)

    found = {}
    for step in steps():
        if isinstance(step, Run):
            launch = step.launch
            shapes = tuple(
                tuple(one.block_shape) for of_input in launch.templates for one in of_input if one is not None
            )
            rest = compiled_for(TYPICAL(launch.rest))
            found.setdefault(id(launch.kernel), set()).add((shapes, rest, launch.options["C"]))
        else:
            step.run(made)
    return found


def test_other_lengths_are_the_same_kernels(kernels) -> None:
    long = launches_at(16384)
    for length in (16383, 9000, 8192, 5003, 4099):
        assert launches_at(length) == long
    # Below a segment too, and of any short sequence.
    for length in (4096, 3000, 2000, 801, 70, 5):
        assert launches_at(length) == long
    # Of segments with many rows those past the end of a short sequence would cost: it has other kernels, for powers of four.
    long, *short = (launches_at(length, ((1 << 20,), (1,))) for length in (1 << 20, 16384, 9000, 5001))
    assert long != short[0] == short[1] == short[2]
    windows = launches_at(8192, window=512)
    for length in (8191, 5003, 4096, 129):
        assert launches_at(length, window=512) == windows
