"""The module over shards: positions are those of the whole sequence, compiled or not."""

from __future__ import annotations

import pytest
import torch
from patterns import relative_error

from longnet import DilatedAttention

OPTIONS = {
    "plain": {},
    "xpos": {"use_xpos": True},
    "xpos, no near common boundary": {"use_xpos": True, "segment_size": (40, 97), "causal": True},
    "bias": {"use_rel_pos_bias": True},
    "both": {"use_xpos": True, "use_rel_pos_bias": True, "causal": True, "kv_heads": 2},
}
SHARDS = (30, 41, 0, 57)


def make(options, **more):
    torch.manual_seed(0)
    settings = {"dilation_rate": (1, 4), "segment_size": (32, 128), **options, **more}
    module = DilatedAttention(32, 4, **settings).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_()
    return module


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, sum(SHARDS), 32, generator=generator, dtype=torch.float64)


def run(module, x, grad):
    x = x.clone().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, (x, *module.parameters()), grad)
    return out.detach(), grads[0], [g.detach() for g in grads[1:]]


def run_shard(group, rank, options, how):
    module = make(options, distributed=group)
    if how == "compiled":
        module.compile(backend="aot_eager")
    x, grad = (one.split(SHARDS, 1)[rank] for one in inputs())
    return run(module, x, grad)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shards_give_what_the_module_gives(ranks, options, how):
    results = ranks(len(SHARDS), run_shard, options, how)
    out, grad_x, grads = run(make(options), *inputs())
    assert relative_error(torch.cat([one[0] for one in results], 1), out) < 1e-10
    assert relative_error(torch.cat([one[1] for one in results], 1), grad_x) < 1e-10
    for got, want in zip(zip(*(one[2] for one in results), strict=True), grads, strict=True):
        assert relative_error(sum(got), want) < 1e-10


def batch_norm(group, rank):
    DilatedAttention(32, 4, 1, 8, sub_norm="batch", distributed=group)


def wrong_group(group, rank):
    DilatedAttention(32, 4, 1, 8, distributed="cp")


def a_mesh(group, rank):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))
    x, grad = (one.split(SHARDS, 1)[rank % 4] for one in inputs())
    found = run(make(OPTIONS["both"], distributed=mesh["cp"]), x, grad)
    with pytest.raises(ValueError, match=r"mesh of 2 dimensions \('dp', 'cp'\): expected one, as in mesh\['cp'\]"):
        DilatedAttention(32, 4, 1, 8, distributed=mesh)
    return found[0]


def test_what_makes_no_sense_is_refused(ranks):
    for function, said in ((batch_norm, "batch statistics"), (wrong_group, "group has type str")):
        for ok, error in ranks.outcomes(2, function):
            assert not ok and said in error, error


def test_a_mesh_of_two_dimensions_has_several_sequences(ranks):
    results = ranks(8, a_mesh)
    out = run(make(OPTIONS["both"]), *inputs())[0]
    for sequence in (results[:4], results[4:]):
        assert relative_error(torch.cat(sequence, 1), out) < 1e-10
