"""Muon of matrices that ranks share: the weights and the state of one rank, bit for bit."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longnet import LongNetConfig, LongNetLM
from longnet.distributed import parallelize
from longnet.training import TrainSettings
from longnet.training.optimizer import make_optimizer
from longnet.training.ranks import spread_like
from longnet.training.state import collect_state

# Two key/value heads of 8 channels: on three ranks no matrix is cut into equal parts.
MODEL = LongNetConfig(layers=2, dim=32, heads=4, kv_heads=2, segment_lengths=(8,), dilation_rates=(1,))
SETTINGS = TrainSettings(out="run", model=MODEL, steps=1, optimizer="muon", lr=0.01)


def trained(group, rank, size):
    """The state after three steps with gradients that do not depend on the ranks, and whether each rank kept its part alone."""
    torch.manual_seed(0)
    model = LongNetLM(MODEL)
    if size > 1:
        parallelize(model, DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",)))
    optimizer = make_optimizer(model, SETTINGS)
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = spread_like(weight, torch.randn(weight.shape))
        optimizer.step()
        optimizer.zero_grad()
    kept = [
        (weight.placements, value.placements)
        for weight, state in optimizer.state.items()
        for value in state.values()
        if isinstance(weight, DTensor) and value.ndim
    ]
    state = collect_state(model, optimizer, torch.device("cpu"))
    return {name: tensor for name, tensor in state.items() if name != "rng.cpu"}, all(a == b for a, b in kept)


def is_of_matrix(name):
    return "_proj.weight" in name or "fc1.weight" in name or "fc2.weight" in name


def test_a_step_on_shards_is_the_step_of_one_rank(ranks):
    ((want, _),) = ranks(1, trained, 1)
    assert any(name.endswith("momentum_buffer") for name in want)
    for state, is_cut in ranks(3, trained, 3):
        assert is_cut and state.keys() == want.keys()
        for name, tensor in state.items():
            # AdamW on a CPU rounds the end of a list of numbers otherwise than its beginning.
            limit = 0.0 if is_of_matrix(name) else 1e-6
            torch.testing.assert_close(tensor, want[name], rtol=limit, atol=limit, msg=name)
