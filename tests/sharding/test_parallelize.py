"""Models over a mesh: the gradients and losses of one device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from patterns import relative_error
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from longnet import LongNetConfig, LongNetEncoder, LongNetLM, distributed
from longnet.distributed import parallelize, shard_lengths, shard_sequence, unshard_sequence
from longnet.models.layer_types import LAYER_TYPES
from longnet.training.ranks import Ranks

CONFIG = LongNetConfig(
    layers=2,
    dim=32,
    heads=4,
    segment_lengths=(32, 128),
    dilation_rates=(1, 4),
    use_xpos=True,
    gradient_checkpointing=True,
)
CONTEXT = 200


def make(dtype=torch.float64, config=CONFIG):
    torch.manual_seed(0)
    return LongNetLM(config, dtype=dtype)


def batches(steps, rows):
    """(steps, rows, N + 1) bytes with something to learn."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (steps, rows, CONTEXT + 1), generator=generator)
    return (tokens + torch.arange(CONTEXT + 1) % 7) % 256


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


LAYERED = CONFIG.replace(
    layers=5,
    layer_types=LAYER_TYPES,
    sliding_window=11,
    stride=2,
    stride_block=3,
    kv_heads=2,
    shift_keys=True,
    far_positions=False,
)


def parallelized(model, mesh, as_one):
    """Weights are gathered as one, or block by block as those of a large model."""
    with pytest.MonkeyPatch.context() as patch:
        if not as_one:
            patch.setattr(distributed, "GATHERED_AS_ONE", 0)
        parallelize(model, mesh)
    assert [isinstance(block, FSDPModule) for block in model.blocks] == [not as_one] * len(model.blocks)
    return model


def gradients(group, rank, dp, cp, lengths, ignored, as_one=True, config=CONFIG):
    mesh = init_device_mesh("cpu", (dp, cp), mesh_dim_names=("dp", "cp"))
    model = parallelized(make(config=config), mesh, as_one)
    rows = batches(1, 2 * dp)[0]
    rows = rows[2 * mesh["dp"].get_local_rank() :][:2]
    targets = rows[:, 1:].clone()
    targets[:, :ignored] = -100
    tokens, goal = (shard_sequence(x, mesh["cp"], lengths=lengths) for x in (rows[:, :-1], targets))
    loss = model.loss(tokens, goal)
    loss.backward()
    return loss.item(), {name: full(weight.grad).clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("ignored", "as_one"), [(0, True), (0, False), (90, True)])
@pytest.mark.parametrize(("dp", "cp", "lengths"), [(1, 8, None), (2, 4, (40, 70, 13, 77)), (4, 2, None), (8, 1, None)])
def test_gradients_are_those_of_one_device(ranks, dp, cp, lengths, ignored, as_one):
    results = ranks(8, gradients, dp, cp, lengths, ignored, as_one)
    assert_alike(results, make(), batches(1, 2 * dp)[0], ignored)


def assert_alike(results, model, rows, ignored=0):
    """(loss, gradients) of every rank are those of one device, whose first targets are left out."""
    targets = rows[:, 1:].clone()
    targets[:, :ignored] = -100
    loss = model.loss(rows[:, :-1], targets)
    loss.backward()
    for got, grads in results:
        assert abs(got - loss.item()) < 1e-12
        for name, weight in model.named_parameters():
            assert relative_error(grads[name], weight.grad) < 1e-10, name


@pytest.mark.parametrize("lengths", [None, (40, 0, 103, 57)])
def test_every_layer_type_is_shared_by_ranks(ranks, lengths):
    # All of the processes: a mesh of some would leave the others behind.
    results = ranks(8, gradients, 2, 4, lengths, 0, lengths is None, LAYERED)
    assert_alike(results, make(config=LAYERED), batches(1, 4)[0])


def steps_of(model, optimizer, mesh, first, last):
    found = []
    for rows in batches(last, 1)[first:]:
        tokens, targets = rows[:, :-1], rows[:, 1:]
        if mesh is not None:
            tokens, targets = shard_sequence(tokens, mesh), shard_sequence(targets, mesh)
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses(group, rank, size):
    """50 steps of a model in float32 on one sequence a step."""
    model = make(torch.float32)
    mesh = None
    if size > 1:
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
        parallelize(model, mesh)
    # Lists of weights: over a mesh each call of Python for a weight by itself takes long.
    return steps_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True), mesh, 0, 50)


@pytest.mark.parametrize("size", [3, 4])
def test_fifty_steps_on_several_ranks_have_the_losses_of_one(ranks, size):
    """On three, shards and the parts of weights are uneven."""
    alone = losses(None, 0, 1)
    assert alone[-1] < alone[0] - 0.5, "nothing is learned"
    for found in ranks(size, losses, size):
        for got, want in zip(found, alone, strict=True):
            assert abs(got - want) < 1e-5 * want


def used_first(group, rank, as_one, with_grad):
    """Losses of a model that ran forward before its weights were halved, and again before its optimizer was made."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    model = parallelized(make(), mesh, as_one)
    rows = batches(1, 1)[0]
    tokens, targets = (shard_sequence(x, mesh) for x in (rows[:, :-1], rows[:, 1:]))

    def use():
        with torch.set_grad_enabled(with_grad):
            model.loss(tokens, targets)

    use()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    use()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = steps_of(model, optimizer, mesh, 0, 3)
    use()
    weights, moments = get_state_dict(model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return found


@pytest.mark.parametrize(("as_one", "with_grad"), [(True, False), (True, True), (False, False)])
def test_a_model_that_ran_forward_is_changed_and_trained_as_any(ranks, as_one, with_grad):
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    alone = steps_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3), None, 0, 3)
    assert alone[-1] < alone[0]
    for found in ranks(2, used_first, as_one, with_grad):
        assert found == pytest.approx(alone, rel=1e-9)


def there_and_back(group, rank, lengths, dim):
    whole = torch.arange(60.0).view(3, 20) if dim == 1 else torch.arange(60.0).view(20, 3)
    own = shard_sequence(whole, group, dim, lengths=lengths).clone().requires_grad_()
    again = unshard_sequence(own, group, dim)
    (again * (rank + 1)).sum().backward()
    return torch.equal(again, whole), own.grad


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("lengths", [None, (1, 12, 0, 7)])
def test_shards_join_to_the_sequence(ranks, lengths, dim):
    for same, grad in ranks(4, there_and_back, lengths, dim):
        assert same and (grad == 1 + 2 + 3 + 4).all()


def test_shard_lengths():
    assert shard_lengths(10, 4) == (2, 3, 2, 3)
    assert shard_lengths(100, 3, 16) == (32, 32, 36)
    assert shard_lengths(0, 2) == (0, 0) and shard_lengths(5, 3, 8) == (0, 0, 5)
    with pytest.raises(ValueError, match="ranks=0"):
        shard_lengths(5, 0)


def refused(group, rank, what):
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    if what == "batch norm":
        parallelize(LongNetEncoder(CONFIG.replace(causal=False, norm="batch")), mesh)
    elif what == "axes":
        parallelize(make(), torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",)))
    elif what == "twice":
        parallelize(parallelize(make(), mesh), mesh)
    elif what == "one axis":
        shard_sequence(torch.ones(7), mesh)
    elif what == "model":
        parallelize(torch.nn.Linear(2, 2), mesh)
    else:
        shard_sequence(torch.ones(2, 7), mesh, lengths=(3, 3))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("batch norm", "statistics would be those of one shard"),
        ("axes", "axes ('tp',): expected 'dp' and 'cp'"),
        ("model", "model has type Linear"),
        ("twice", "model is sharded already"),
        ("one axis", "dim=1 of a tensor of shape (7,)"),
        ("lengths", "of 7 tokens together"),
    ],
)
def test_what_makes_no_sense_is_refused(ranks, what, said):
    for ok, error in ranks.outcomes(2, refused, what):
        assert not ok and said in error, error


def a_random_number(group, rank):
    torch.manual_seed(0)
    Ranks(init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))).vary_dropout(5)
    return torch.rand(()).item()


def test_dropout_differs_from_rank_to_rank(ranks):
    found = ranks(8, a_random_number)
    torch.manual_seed(0)
    assert found[0] == torch.rand(()).item(), "the first one's numbers are those of a run on one device"
    assert len(set(found)) == 8


def checkpointed(group, rank, size, folder, first, last):
    """Steps ``first`` to ``last`` on ``size`` ranks, from the distributed checkpoint in ``folder`` and into it."""
    mesh, model = None, make()
    if size > 1:
        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
        parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    alone = {"no_dist": True} if size == 1 else {"process_group": group}
    if first:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder, **alone)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    found = steps_of(model, optimizer, mesh, first, last)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder, **alone)
    return found


def test_a_distributed_checkpoint_goes_on_with_any_number_of_ranks(ranks, tmp_path):
    """torch.distributed.checkpoint, which writes every rank's part by itself: four ranks, then two, then one."""
    folder = str(tmp_path / "checkpoint")
    first = ranks(4, checkpointed, 4, folder, 0, 3)
    assert (tmp_path / "checkpoint" / ".metadata").is_file()
    assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 4
    second = ranks(2, checkpointed, 2, folder, 3, 6)
    third = ranks(1, checkpointed, 1, folder, 6, 9)
    model = make()
    want = steps_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3), None, 0, 9)
    for results, part in ((first, want[:3]), (second, want[3:6]), (third, want[6:])):
        for got in results:
            assert got == pytest.approx(part, rel=1e-9)


def layered(layer_types, **changes):
    options = {"sliding_window": 9, "stride": 2, "kv_heads": 2, "layers": 2, "segment_lengths": (32, 64)}
    return make(config=CONFIG.replace(layer_types=layer_types, **options | {"dilation_rates": (1, 2)} | changes))


def losses_of_layers(group, rank, layer_types):
    """Over replicas alone."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    model = parallelize(layered(layer_types), mesh)
    rows = batches(1, 2)[0][rank : rank + 1]
    loss = model.loss(rows[:, :-1], rows[:, 1:])
    loss.backward()
    return loss.item(), {name: full(weight.grad).clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("layer_types", [*((one,) for one in LAYER_TYPES), LAYER_TYPES[2:4]])
def test_layers_of_every_type_over_replicas(ranks, layer_types):
    results = ranks(2, losses_of_layers, layer_types)
    assert_alike(results, layered(layer_types), batches(1, 2)[0])


def refusal(group, rank):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    model = parallelize(layered(("full_attention",)), mesh)
    with pytest.raises(ValueError, match="model is parallelized: expected with_layer_types before parallelize"):
        model.with_layer_types(("sliding_attention",))


def test_layer_types_are_changed_before_a_model_is_shared(ranks):
    ranks(2, refusal)


def left_padded(group, rank):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    model = parallelize(make(), mesh)
    rows, mask = batches(1, 1)[0][:, :-1], torch.arange(CONTEXT)[None] < 7
    got = model(*(shard_sequence(x, mesh["cp"]) for x in (rows, mask)))
    return unshard_sequence(got, mesh["cp"]).detach()


def test_padding_counts_as_positions_where_ranks_share_rows(ranks):
    model, rows, mask = make(), batches(1, 1)[0][:, :-1], torch.arange(CONTEXT)[None] < 7
    want = model.logits(model.run_blocks(model.embed(rows), mask)).detach()
    for got in ranks(2, left_padded):
        assert relative_error(got[:, 7:], want[:, 7:]) < 1e-10
