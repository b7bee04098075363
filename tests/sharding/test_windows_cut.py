"""How windows are cut: what the first process finds holds in all, and a failing estimate ends no run."""

from __future__ import annotations

from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh

from longnet.models import LongNetConfig
from longnet.training import TrainSettings, ranks
from longnet.training.cut import even_cut
from longnet.training.ranks import Ranks

MODEL = LongNetConfig(
    layers=1, dim=16, heads=2, layer_types=("full_attention",), segment_lengths=(8,), dilation_rates=(1,)
)
SETTINGS = TrainSettings(out="run", model=MODEL, steps=1, context=512, batch=1, cp=2)


def cut(group, rank, fails):
    """The lines, and what is cut, on each rank."""
    mesh = DeviceMesh("cpu", torch.arange(2).view(1, 2), mesh_dim_names=("dp", "cp"))
    made = Ranks(mesh, group)

    def failing(*_):
        raise RuntimeError("no memory\nand more")

    with mock.patch.object(ranks, "choose_cut", failing if fails else ranks.choose_cut):
        lines = made.choose_cut(SETTINGS, torch.device("cpu"))
    own = made.own_windows(torch.arange(512)[None])
    return lines, made.cut(512), own[0].tolist(), made.whole_windows(own)[0].tolist()


def test_all_processes_cut_as_the_first_finds_best(ranks):
    (lines, parts, first, whole), (*same, second, _) = ranks(2, cut, False)
    assert same == [lines, parts] and parts[0] > 256 and sum(parts) == 512
    assert lines[0].startswith(
        f"Processes share a window of 512 tokens in parts of {parts[0]}, {parts[1]}, for equal work"
    )
    assert first == list(range(parts[0])) and first + second == whole == list(range(512))


def test_a_failing_estimate_leaves_parts_equal(ranks):
    for lines, parts, *_ in ranks(2, cut, True):
        assert lines == ["Parts of a window are equal, as no estimate of a step could be made: no memory"]
        assert parts == even_cut(512, 2) == (256, 256)
