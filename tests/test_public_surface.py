"""The public names and their signatures, exactly: a change here is a change for users and belongs in the changelog."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import LongNet
import longnet
import longnet.compress
import longnet.geometry
import longnet.training
from longnet import (
    DilatedAttention,
    DilatedCache,
    LongNetConfig,
    LongNetEncoder,
    LongNetLM,
    dilated_attention,
    stream_attention,
)
from longnet.attention.backends import BACKENDS

ROOT = Path(__file__).parents[1]

NAMES = {
    longnet: [
        *("DilatedAttention", "DilatedCache", "LongNetConfig", "LongNetEncoder", "LongNetLM"),
        *("dilated_attention", "geometry", "stream_attention"),
    ],
    longnet.geometry: [
        *("HEAD_OFFSETS", "Branch", "BranchPlan", "Cost", "Coverage", "HeadNumbers", "HeadOffsets", "KeysPerQuery"),
        *("LayerReach", "Pattern", "Plan", "Tile", "Uncovered", "Work"),
        *("cost", "coverage", "keys_per_query", "make_plan", "receptive_field", "score_pairs"),
        *("score_pairs_by_shard", "suggest_pattern", "uncovered_positions"),
    ],
    longnet.training: [
        *("CheckpointError", "Corpus", "Evaluation", "TrainSettings", "TrainSummary", "TrainingDiverged"),
        *("TransformerConfig", "load_model", "read_corpus", "read_transformer", "save_model", "train", "write_report"),
    ],
    longnet.compress: [
        *("SCHEMES", "convert_qat", "head_importance", "least_important", "prepare_qat", "prune_heads", "quantization"),
        "quantize",
    ],
    LongNet: ["DilatedAttention"],
}

# Names, order, kinds and defaults of the parameters.
SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (
        dilated_attention,
        "(query, key, value, segment_lengths, dilation_rates, *, window=None, dilated_queries=True, dilation_block=1, "
        "segment_offset=0, is_causal=False, scale=None, key_padding_mask=None, cu_seqlens=None, "
        "head_offsets='interleaved', return_lse=False, backend='auto', group=None)",
    ),
    (
        DilatedAttention,
        "(dim, heads, dilation_rate, segment_size, dropout=0.0, causal=False, use_xpos=False, "
        "use_rel_pos_bias=False, distributed=False, *, qk_norm=False, kv_heads=None, "
        "bias=True, sub_norm=None, head_offsets='interleaved', head_numbers=None, xpos_scale_base=None, "
        "rel_pos_buckets=32, rel_pos_max_distance=128, backend='auto', window=None, dilated_queries=True, "
        "dilation_block=1, segment_offset=0, shift_keys=False, check_coverage=True, device=None, dtype=None)",
    ),
    (
        DilatedAttention.forward,
        "(self, x, key_padding_mask=None, *, cu_seqlens=None, cache=None, segment_offset=None)",
    ),
    (
        DilatedCache,
        "(segment_lengths, dilation_rates, *, batch_size, heads, head_dim, kv_heads=None, head_offsets='interleaved', "
        "head_numbers=None, window=None, dilated_queries=True, dilation_block=1, segment_offset=0, capacity=None, "
        "shift_keys=False, check_coverage=True, backend='auto', dtype=None, device=None)",
    ),
    (DilatedCache.reorder, "(self, index)"),
    (DilatedCache.load_state_dict, "(self, state)"),
    (DilatedCache.moved, "(self, tokens, *, on_device=True)"),
    (DilatedCache.set_segment_offset, "(self, segment_offset)"),
    (DilatedCache.holds, "(self, position)"),
    (stream_attention, "(query, key, value, cache, *, scale=None, key_padding_mask=None, return_lse=False)"),
    (
        LongNetConfig,
        "(vocab_size=256, dim=768, heads=12, layers=12, ffn_dim=None, "
        "segment_lengths=(2048, 4096, 8192, 16384, 32768), dilation_rates=(1, 2, 4, 6, 12), kv_heads=None, "
        "causal=True, norm='layer', qk_norm=False, bias=True, dropout=0.0, use_xpos=True, use_rel_pos_bias=False, "
        "head_offsets='interleaved', head_numbers=None, xpos_scale_base=None, tie_embeddings=True, "
        "gradient_checkpointing=False, loss_chunk=None, feed_forward_chunk=None, backend='auto', layer_types=None, "
        "sliding_window=512, stride=4, stride_block=1, shift_keys=False, far_positions=True)",
    ),
    (LongNetConfig.preset, "(name, stack=None, **changes)"),
    (LongNetConfig.presets, "()"),
    (LongNetConfig.stacks, "()"),
    (LongNetConfig.to_dict, "(self)"),
    (LongNetConfig.from_dict, "(values)"),
    (LongNetConfig.replace, "(self, **changes)"),
    (LongNetLM, "(config, *, device=None, dtype=None)"),
    (LongNetLM.forward, "(self, tokens, key_padding_mask=None, *, cache=None)"),
    (LongNetLM.hidden, "(self, tokens, key_padding_mask=None, *, cache=None)"),
    (LongNetLM.new_cache, "(self, batch_size, *, max_length=None, dtype=None)"),
    (LongNetLM.logits, "(self, hidden)"),
    (LongNetLM.with_layer_types, "(self, layer_types, **changes)"),
    (
        LongNetLM.loss,
        "(self, tokens, targets, *, key_padding_mask=None, reduction='mean', ignore_index=-100, cu_seqlens=None)",
    ),
    (
        LongNetLM.generate,
        "(self, tokens, max_new_tokens, *, key_padding_mask=None, temperature=1.0, top_k=None, top_p=None, seed=None, "
        "eos=None, stop=None, pad=None, on_token=None, streamer=None)",
    ),
    (LongNetEncoder, "(config, *, device=None, dtype=None)"),
    (LongNetEncoder.forward, "(self, tokens=None, key_padding_mask=None, *, embeddings=None)"),
    (
        longnet.geometry.Pattern.parse,
        "(segment_lengths, dilation_rates, head_offsets='interleaved', head_numbers=None, total_heads=0)",
    ),
    (longnet.geometry.make_plan, "(pattern, heads, length, first_head=0, last_head=None, segment_offset=0)"),
    (
        longnet.geometry.cost,
        "(pattern, heads, length, head_dim, *, is_causal=False, kv_heads=None, batch=1, bytes_per_element=2, "
        "segment_offset=0)",
    ),
    (longnet.geometry.coverage, "(pattern, heads, length=None)"),
    (longnet.geometry.uncovered_positions, "(pattern, heads, length=None)"),
    (longnet.geometry.keys_per_query, "(pattern, heads, length, is_causal=False)"),
    (longnet.geometry.score_pairs, "(pattern, heads, length, is_causal=False, *, segment_offset=0)"),
    (
        longnet.geometry.receptive_field,
        "(pattern, heads, length, layers, is_causal=False, position=None, *, segment_offset=0)",
    ),
    (longnet.geometry.score_pairs_by_shard, "(pattern, heads, shard_lengths, is_causal=False)"),
    (
        longnet.geometry.suggest_pattern,
        "(max_length, budget, *, heads=None, ratio=2, head_offsets='interleaved')",
    ),
    (longnet.compress.head_importance, "(model, batches, *, loss=None)"),
    (longnet.compress.least_important, "(model, scores, fraction)"),
    (longnet.compress.prune_heads, "(model, heads)"),
    (longnet.compress.quantize, "(model, scheme, *, head=False)"),
    (longnet.compress.quantization, "(model)"),
    (longnet.compress.prepare_qat, "(model, scheme, *, head=False)"),
    (longnet.compress.convert_qat, "(model, scheme)"),
    (longnet.training.load_model, "(run, device='cpu')"),
    (longnet.training.read_transformer, "(folder, context, **changes)"),
    (
        longnet.training.TransformerConfig,
        "(transformer, tokenizer_size=None, segment_lengths=(), dilation_rates=(), head_offsets='interleaved', "
        "layer_types=None, sliding_window=None, stride=4, stride_block=1, backend='auto', gradient_checkpointing=False, "
        "loss_chunk=None)",
    ),
    (longnet.training.save_model, "(model, path, *, tokenizer=None)"),
]

# Public methods and properties of the classes, their own and those of their bases in this package.
MEMBERS = {
    DilatedAttention: {
        *("attend", "definition", "extra_repr", "forward", "reset_parameters", "segment_offset", "shift_keys"),
    },
    DilatedCache: {
        *(
            "bounded",
            "clone",
            "device",
            "dtype",
            "holds",
            "load_state_dict",
            "moved",
            "nbytes",
            "nbytes_used",
            "position",
        ),
        *("reading", "reorder", "reset", "set_segment_offset", "state_dict"),
    },
    LongNetConfig: {
        *("feed_forward_dim", "from_dict", "head_dim", "layer_attention", "layer_attentions", "layer_head_numbers"),
        *("preset", "presets", "replace", "stacks", "to_dict"),
    },
    LongNetLM: {
        *("check_mask", "check_tokens", "embed", "forward", "generate", "hidden", "logits", "loss", "new_cache"),
        *("reset_parameters", "run_blocks", "with_layer_types"),
    },
    LongNetEncoder: {
        *("check_mask", "check_tokens", "embed", "forward", "reset_parameters", "run_blocks", "with_layer_types"),
    },
}


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_the_public_names(module: Any) -> None:
    assert module.__all__ == NAMES[module]
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=[item[0].__qualname__ for item in SIGNATURES])
def test_the_signature_of(function: Callable[..., Any], expected: str) -> None:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == expected


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_the_public_members_of(kind: type) -> None:
    fields = getattr(kind, "__dataclass_fields__", {})
    owners = [base for base in kind.__mro__ if base.__module__.startswith("longnet")]
    names = {name for base in owners for name in vars(base) if not name.startswith("_")}
    assert names - set(fields) == MEMBERS[kind]


def test_the_names_a_checkpoint_holds() -> None:
    module = DilatedAttention(8, 2, 1, 4)
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert list(module.state_dict()) == [f"{name}.{part}" for name in projections for part in ("weight", "bias")]


def test_the_names_given_as_text() -> None:
    assert [backend.name for backend in BACKENDS] == ["cpu_flash", "triton", "portable"]
    assert longnet.geometry.HEAD_OFFSETS == ("interleaved", "blocked", "grouped")
    assert LongNetConfig.presets() == ("base", "small", "tiny", "nano")
    assert LongNetConfig.stacks() == ("balanced", "light", "longnet")


def test_the_alias_is_the_same_class() -> None:
    assert LongNet.DilatedAttention is longnet.DilatedAttention


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == longnet.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(longnet.__file__).with_name("py.typed").is_file()
