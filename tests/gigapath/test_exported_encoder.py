"""The encoder exported, and what a trace must leave behind: nothing."""

from __future__ import annotations

import pytest
import torch
from slides import encoder, slides
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

import longnet.gigapath.encoder
from longnet.gigapath import ClassificationHead, SlideEncoder
from longnet.gigapath.positions import axis_table
from longnet.gigapath.readout import log_times, read_by_first_token

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longnet.gigapath.encoder, "segment_lengths", lambda *_: (8, 12, 16, 24, 64))


def exported(model: nn.Module, tiles: int = 50, strict: bool = False) -> ExportedProgram:
    several = {1: Dim("tiles", min=2, max=4096)}
    return export(model, slides(tiles, dtype=torch.float32), dynamic_shapes=(several, several), strict=strict)


@pytest.mark.parametrize(("global_pool", "compat"), [(False, True), (True, True), (False, False)])
def test_the_program_is_the_encoder_for_any_number_of_tiles(global_pool: bool, compat: bool) -> None:
    model = encoder(2, torch.float32, global_pool=global_pool, torchscale_compat=compat)
    program = exported(model).module()
    for tiles in (3, 50, 130):
        inputs = slides(tiles, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    x, coords = slides(3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="outside of the grid"):
        program(x, coords - 1e6)


def test_a_head_is_exported() -> None:
    head = ClassificationHead(encoder(2, torch.float32), 3, layers=(0, 1)).eval()
    program = exported(head).module()
    inputs = slides(70, dtype=torch.float32)
    torch.testing.assert_close(program(*inputs), head(*inputs), rtol=1e-5, atol=1e-5)


class _Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise MemoryError


@pytest.mark.parametrize("tiles", [33, 34])
def test_an_export_that_failed_leaves_nothing_behind(tiles: int) -> None:
    model = encoder(2, torch.float32)
    inputs = slides(tiles, dtype=torch.float32)
    failing = encoder(2, torch.float32)
    failing.blocks[1] = _Fails()
    with pytest.raises(MemoryError):
        export(failing, inputs, strict=False)
    (got,) = model(*inputs)
    assert type(got) is Tensor
    pattern = model.blocks[0].attention.pattern
    assert len(read_by_first_token(pattern, 16, tiles + 1, CPU)) < tiles
    for compat in (True, False):
        one = encoder(2, torch.float32, torchscale_compat=compat)
        assert isinstance(float(one(*inputs)[0].detach().sum()), float)


def test_tables_of_fake_tensors_are_not_cached() -> None:
    pattern = SlideEncoder(16, 1).blocks[0].attention.pattern
    for length in (40, 41):
        calls = {
            "table": lambda length=length: axis_table(length, 8, torch.float32, CPU),
            "times": lambda length=length: log_times(pattern, 16, length, CPU, torch.float32),
        }
        for call in calls.values():
            with FakeTensorMode():
                assert type(call()) is not Tensor
            real = call()
            assert type(real) is Tensor and real is call()
            with FakeTensorMode():
                assert type(call()) is not Tensor
            assert type(torch.func.functionalize(call)()) is Tensor


def test_an_encoder_that_the_caller_compiles() -> None:
    torch._dynamo.reset()
    model = encoder(2, torch.float32)
    inputs = slides(44, dtype=torch.float32)
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(*inputs)
        torch.testing.assert_close(got, model(*inputs), rtol=1e-5, atol=1e-5)
    # torch 2.11 takes the check into its graph, where it is an assertion.
    with pytest.raises((ValueError, RuntimeError), match="outside of the grid"):
        torch.compile(model, backend="eager")(inputs[0], inputs[1] - 1e6)
    torch._dynamo.reset()
