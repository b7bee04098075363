"""LongNetConfig: presets, round trips, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from longnet.geometry import Pattern
from longnet.models import LongNetConfig


def test_base_is_the_papers_size() -> None:
    base = LongNetConfig.preset("base", "longnet")
    assert base == LongNetConfig(qk_norm=True)
    balanced = LongNetConfig.preset("base")
    assert (balanced.dim, balanced.heads, balanced.layers) == (base.dim, base.heads, base.layers)
    assert (base.dim, base.heads, base.layers, base.feed_forward_dim, base.head_dim) == (768, 12, 12, 3072, 64)
    assert base.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert base.dilation_rates == (1, 2, 4, 6, 12)
    assert base.causal and base.use_xpos and base.tie_embeddings


@pytest.mark.parametrize("name", LongNetConfig.presets())
def test_presets_reach_every_position_with_every_rate(name: str) -> None:
    config = LongNetConfig.preset(name, "longnet")
    pattern = Pattern.parse(config.segment_lengths, config.dilation_rates, config.head_offsets)
    for branch in pattern.branches:
        offsets = {pattern.offset(branch, head, config.heads) for head in range(config.heads)}
        assert offsets == set(range(branch.dilation_rate))


@pytest.mark.parametrize("name", LongNetConfig.presets())
def test_dict_and_json_round_trips(name: str) -> None:
    config = LongNetConfig.preset(name, dropout=0.25, kv_heads=1, xpos_scale_base=700.0)
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert LongNetConfig.from_dict(json.loads(json.dumps(values))) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(copy.deepcopy(config)) == hash(config)


def test_preset_changes_and_replace_are_checked() -> None:
    config = LongNetConfig.preset("nano", layers=3, segment_lengths=[8, 16], dilation_rates=[1, 2])
    assert (config.layers, config.segment_lengths, config.dilation_rates) == (3, (8, 16), (1, 2))
    assert config.replace(dim=64).feed_forward_dim == 256
    assert LongNetConfig.preset("nano", segment_lengths=8, dilation_rates=1).segment_lengths == (8,)
    with pytest.raises(ValueError, match="dim=30"):
        config.replace(dim=30)
    with pytest.raises(ValueError, match="'depth'"):
        config.replace(depth=3)
    with pytest.raises(ValueError, match="'depth'"):
        LongNetConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match=r"'huge'.*base"):
        LongNetConfig.preset("huge")


@pytest.mark.parametrize("name", LongNetConfig.presets())
def test_stacks_of_a_preset(name: str) -> None:
    """One full layer in eight in the middle of each eight, every fourth key in the middle quarter, or the paper's pattern."""
    balanced, light = LongNetConfig.preset(name, "balanced"), LongNetConfig.preset(name, "light")
    assert balanced == LongNetConfig.preset(name) or name == "nano"
    assert LongNetConfig.preset(name, "longnet").layer_types is None
    for config, far in ((balanced, "full_attention"), (light, "strided_attention")):
        assert set(config.layer_types) == {"sliding_attention", far}
        assert config.shift_keys and not config.far_positions and config.stride == 4
        # Runs of one preset begin with the weights of another stack's.
        assert config.qk_norm == LongNetConfig.preset(name, "longnet").qk_norm == (name != "nano")
        # Kept for a model that is given dilated layers later.
        assert config.segment_lengths == LongNetConfig.preset(name, "longnet").segment_lengths
    eight = LongNetConfig.preset(name, "balanced", layers=8)
    assert [i for i, kind in enumerate(eight.layer_types) if kind == "full_attention"] == [4]
    more = LongNetConfig.preset(name, "balanced", layers=24)
    assert [i for i, kind in enumerate(more.layer_types) if kind == "full_attention"] == [4, 12, 20]
    eight = LongNetConfig.preset(name, "light", layers=8)
    assert [i for i, kind in enumerate(eight.layer_types) if kind == "strided_attention"] == [3, 4]


def test_what_a_preset_reads_is_named_once() -> None:
    own = LongNetConfig.preset("small", layer_types=("sliding_attention", "full_attention"))
    assert own.layer_types.count("full_attention") == 4 and not own.shift_keys and own.far_positions
    segments = LongNetConfig.preset("small", segment_lengths=(64,), dilation_rates=(2,))
    assert segments.layer_types is None and segments.segment_lengths == (64,)
    assert LongNetConfig.preset("small", "longnet", segment_lengths=(64,), dilation_rates=(2,)) == segments
    with pytest.raises(
        ValueError, match=r"layer_types=\('full_attention',\) with stack='light': expected one of the two"
    ):
        LongNetConfig.preset("small", "light", layer_types=("full_attention",))
    with pytest.raises(
        ValueError, match=r"stack='dense' is not a stack: expected one of \('balanced', 'light', 'longnet'\)"
    ):
        LongNetConfig.preset("small", "dense")
    with pytest.raises(TypeError, match=r"stack=\['light'\] has type list: expected a string"):
        LongNetConfig.preset("small", ["light"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name=None has type NoneType: expected a string"):
        LongNetConfig.preset(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers=0: expected at least 1"):
        LongNetConfig.preset("small", layers=0)


def test_a_preset_cannot_be_changed_through_what_it_returns() -> None:
    LongNetConfig.preset("tiny", "longnet").to_dict()["segment_lengths"].append(1)
    assert LongNetConfig.preset("tiny", "longnet").segment_lengths == (256, 1024, 8192)
    with pytest.raises(AttributeError):
        LongNetConfig().dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 770}, "dim=770.*heads=12"),
        ({"kv_heads": 5}, "heads=12.*kv_heads=5"),
        ({"layers": 0}, "layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"ffn_dim": 0}, "ffn_dim=0"),
        ({"loss_chunk": 0}, "loss_chunk=0"),
        ({"feed_forward_chunk": 0}, "feed_forward_chunk=0"),
        ({"feed_forward_chunk": 8, "norm": "batch", "causal": False}, "feed_forward_chunk=8 with norm='batch'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"norm": "group"}, "norm='group'"),
        ({"norm": "batch"}, "norm='batch' with causal=True.*future"),
        ({"segment_lengths": (4, 8)}, "differ in length"),
        ({"segment_lengths": 2, "dilation_rates": 4}, "rate <= length"),
        ({"head_offsets": "random"}, "head_offsets='random'"),
        ({"dim": 36, "heads": 12}, "odd"),
        ({"xpos_scale_base": 0.0}, "xpos_scale_base=0.0"),
        ({"xpos_scale_base": float("inf")}, "xpos_scale_base=inf"),
        ({"backend": ""}, "backend"),
        ({"layers": 2, "head_numbers": [[0, 1]]}, "head_numbers are of 1 layers: expected layers=2"),
        ({"layers": 1, "head_numbers": [[]]}, r"head_numbers=\(\): expected at least one of the heads 0 to 11"),
        ({"layers": 1, "head_numbers": [[1, 0]]}, r"head_numbers=\(1, 0\): .*in rising order"),
        ({"layers": 1, "head_numbers": [[0, 12]]}, r"head_numbers=\(0, 12\)"),
        ({"layers": 1, "head_numbers": [[0, 1, 2]], "kv_heads": 6}, "all 2 heads of a key/value head, or none"),
        ({"layers": 1, "head_numbers": [[0]], "norm": "batch", "causal": False}, "head_numbers with norm='batch'"),
    ],
)
def test_bad_values_teach(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongNetConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 768.0},
        {"heads": True},
        {"causal": 1},
        {"dropout": "0.1"},
        {"norm": None},
        {"segment_lengths": (2.0,)},
        {"vocab_size": None},
        {"xpos_scale_base": "512"},
        {"head_numbers": 3},
        {"head_numbers": [[0.5]] * 12},
    ],
)
def test_wrong_types_are_type_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(changes))):
        LongNetConfig(**changes)


def test_pruned_heads_are_of_each_layer_and_survive_json() -> None:
    config = LongNetConfig.preset("nano", head_numbers=[[0, 3], [0, 1, 2, 3]])
    assert config.head_numbers == ((0, 3), (0, 1, 2, 3))
    assert [config.layer_head_numbers(layer) for layer in range(2)] == [(0, 3), None]
    assert (config.heads, config.head_dim) == (4, 8)
    assert LongNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    assert LongNetConfig.preset("nano", head_numbers=[[0, 1, 2, 3]] * 2) == LongNetConfig.preset("nano")


def test_batch_norm_and_odd_heads_where_they_make_sense() -> None:
    assert LongNetConfig(norm="batch", causal=False).norm == "batch"
    assert LongNetConfig(dim=36, use_xpos=False).head_dim == 3
