"""``longnet.hf.apply`` with ``layer_types``: each layer computes what its type says, or what it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from apply_models import VOCABULARY, inputs, llama, logits, make, mistral, qwen2
from oracle import dense_attention
from test_apply_exact import leading, padding
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from longnet.hf import BoundedCache, apply, load, restore
from longnet.hf.transformers_internals import CACHE

W, STRIDE = 9, 3
PATTERN: dict[str, Any] = {"segment_lengths": (8, 24), "dilation_rates": (1, 3)}
WINDOW: dict[str, Any] = {"segment_lengths": (), "dilation_rates": (), "window": W}
OF_TYPE: dict[str, dict[str, Any]] = {
    "dilated_attention": PATTERN,
    "shifted_dilated_attention": {**PATTERN, "segment_offset": 16},
    "sliding_attention": WINDOW,
    "strided_attention": {
        "segment_lengths": (None,),
        "dilation_rates": (STRIDE,),
        "window": W,
        "dilated_queries": False,
        "dilation_block": 2,
        "head_offsets": "grouped",
    },
    "full_attention": {"segment_lengths": (None,), "dilation_rates": (1,)},
}
OPTIONS: dict[str, Any] = {"sliding_window": W, "stride": STRIDE, "stride_block": 2}
STACKS = [
    ("sliding_attention", "strided_attention", "full_attention"),
    ("dilated_attention", "shifted_dilated_attention", "strided_attention"),
    ("full_attention", "dilated_attention", "sliding_attention"),
]


def qwen2_sliding(**changes: Any) -> PreTrainedModel:
    """The first layer reads all, the others a window."""
    return qwen2(**{"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1, **changes})


def gemma3(**changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    more: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": W, "vocab_size": VOCABULARY}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**sizes, **more, **ids, "layer_types": types, **changes})
    return transformers.Gemma3ForCausalLM(config)


def prepared(make_model: Callable[..., PreTrainedModel], **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make_model(**changes).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def set_to_oracle(model: PreTrainedModel, kinds: list[dict[str, Any]]) -> None:
    """Each layer attends by the definition of its kind: dense, in float64."""
    order: dict[nn.Module, int] = {}

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        kind = dict(kinds[order.setdefault(module, len(order))])
        offset = kind.pop("segment_offset", 0)
        if module.is_causal and mask is not None:
            offset = offset - leading(mask)
        options: dict[str, Any] = {"is_causal": bool(module.is_causal), "scale": scaling, "segment_offset": offset}
        out, _lse = dense_attention(q, k, v, **kind, **options, key_padding_mask=None if mask is None else ~mask)
        return out.transpose(1, 2), None

    AttentionInterface.register("oracle_of_layer_types", attend)
    AttentionMaskInterface.register("oracle_of_layer_types", flash_attention_mask)
    model.set_attn_implementation("oracle_of_layer_types")


def options_of(layer_types: tuple[str, ...]) -> dict[str, Any]:
    needs = any("dilated" in name for name in layer_types)
    return {**(PATTERN if needs else {}), "layer_types": layer_types, **OPTIONS}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "make_model", [llama, lambda: mistral(sliding_window=W), lambda: mistral(sliding_window=5), qwen2_sliding]
)
def test_each_layer_computes_its_type(make_model: Any, stack: tuple[str, ...], side: str | None) -> None:
    given = inputs("llama")
    if side is not None:
        given["attention_mask"] = padding(side)
    oracle = prepared(make_model)
    set_to_oracle(oracle, [OF_TYPE[name] for name in stack])
    expected = logits(oracle, given)
    changed = apply(prepared(make_model), **options_of(stack))
    real = padding(side).bool()
    for options in ({"use_cache": False}, {"use_cache": True}):
        assert (logits(changed, given, **options)[real] - expected[real]).abs().max() < 1e-9
    assert (logits(prepared(make_model), given)[real] - expected[real]).abs().max() > 1e-3
    restore(changed)
    assert torch.equal(logits(changed, given), logits(prepared(make_model), given))


def test_windows_of_an_encoder_reach_to_both_sides() -> None:
    """``sliding_window`` counts the keys on one side, as transformers' own encoders do."""
    given, types = inputs("bert"), ("sliding_attention",)
    oracle = make("bert").double()
    set_to_oracle(oracle, [{**WINDOW, "window": W + 1}] * 3)
    found = logits(apply(make("bert").double(), layer_types=types, sliding_window=W), given)
    assert (found - logits(oracle, given)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("make_model", "types"),
    [
        (llama, ("full_attention",)),
        (lambda: mistral(sliding_window=W), ("sliding_attention",)),
        (qwen2_sliding, ("full_attention", "sliding_attention", "sliding_attention")),
        (gemma3, ("sliding_attention", "sliding_attention", "full_attention")),
    ],
)
@pytest.mark.parametrize("side", [None, "left"])
def test_a_layer_that_is_of_its_type_runs_its_own_function(make_model: Any, types: Any, side: str | None) -> None:
    given = inputs("llama")
    if side is not None:
        given["attention_mask"] = padding(side)
    real = padding(side).bool()
    expected = logits(prepared(make_model), given)
    model = apply(prepared(make_model), layer_types=types)
    assert torch.equal(logits(model, given)[real], expected[real])
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **options), prepared(make_model).generate(**given, **options))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("make_model", [llama, lambda: mistral(sliding_window=W), qwen2_sliding])
def test_generation_is_that_of_whole_forwards(make_model: Any, stack: tuple[str, ...]) -> None:
    """Rows of unequal length, padded on the left: each continues as it does alone, without any cache."""
    model, ids, mask = apply(prepared(make_model), **options_of(stack)), inputs("llama")["input_ids"], padding("left")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    for row, first in ((0, 0), (1, 13)):
        alone = ids[row : row + 1, first:]
        for _ in range(12):
            alone = torch.cat((alone, logits(model, {"input_ids": alone}, use_cache=False)[:, -1:].argmax(-1)), 1)
        assert torch.equal(found[row, first:], alone[0])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", [BoundedCache, lambda model: transformers.DynamicCache(config=model.config), None])
def test_chunks_read_into_a_cache_give_what_one_forward_gives(stack: tuple[str, ...], kind: Any) -> None:
    make_model = lambda: mistral(sliding_window=W)  # noqa: E731
    model, ids = apply(prepared(make_model), **options_of(stack)), inputs("llama")["input_ids"]
    whole = logits(model, {"input_ids": ids}, use_cache=False)
    cache, parts = None if kind is None else kind(model), []
    for chunk in ids.split((20, 1, 1, 17, 11), 1):
        with torch.no_grad():
            read = model(input_ids=chunk, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = read[CACHE]
        parts.append(read.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-9


def test_a_cache_of_windows_is_refused_where_earlier_keys_are_read() -> None:
    make_model = lambda: mistral(sliding_window=W)  # noqa: E731
    cache = transformers.DynamicCache(config=prepared(make_model).config)
    model, ids = apply(prepared(make_model), **options_of(STACKS[0])), inputs("llama")["input_ids"]
    logits(model, {"input_ids": ids[:, :20]}, **{CACHE: cache})
    with pytest.raises(ValueError, match="a cache of the last 9 keys"):
        logits(model, {"input_ids": ids[:, 20:21]}, **{CACHE: cache})


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("make_model", [llama, lambda: mistral(sliding_window=5), qwen2_sliding])
def test_a_saved_model_is_loaded_as_it_was(make_model: Any, stack: tuple[str, ...], tmp_path: Path) -> None:
    model, given = apply(prepared(make_model), **options_of(stack)), inputs("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="load this folder with longnet.hf.load"):
        type(model).from_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(again, given), logits(model, given))
    plain = restore(again)
    assert torch.equal(logits(plain, given), logits(prepared(make_model), given))
    for name in ("layer_types", "sliding_window", "num_hidden_layers"):
        assert getattr(plain.config, name, None) == getattr(prepared(make_model).config, name, None)


def test_gemma_loads_and_generates(tmp_path: Path) -> None:
    types = ("sliding_attention", "sliding_attention", "full_attention")
    model = apply(prepared(gemma3), layer_types=types)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float64).eval()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        again.generate(**inputs("llama"), **options), prepared(gemma3).generate(**inputs("llama"), **options)
    )


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (llama, {"layer_types": "full_attention"}, TypeError, "layer_types='full_attention' has type str: expected a tuple"),
        (llama, {"layer_types": (1,)}, TypeError, "holds 1 of type int"),
        (llama, {"layer_types": ("linear_attention",)}, ValueError, "holds 'linear_attention': expected one of"),
        (llama, {"layer_types": ("full_attention",) * 2}, ValueError, "has 2 entries: expected a number that divides layers=3"),
        (llama, {"layer_types": ()}, ValueError, "has 0 entries"),
        (llama, {"layer_types": ("dilated_attention",)}, ValueError, "without segment_lengths and dilation_rates"),
        (llama, {**PATTERN, "layer_types": ("full_attention",)}, ValueError, "expected a dilated layer, or no pattern"),
        (llama, {"layer_types": ("sliding_attention",)}, ValueError, "sliding_window=None: expected a number of tokens"),
        (llama, {"layer_types": ("strided_attention",), "sliding_window": 0}, ValueError, "sliding_window=0"),
        (llama, {"layer_types": ("strided_attention",), "sliding_window": 4, "stride": 0}, ValueError, "stride=0"),
        (llama, {"layer_types": ("strided_attention",), "sliding_window": 4, "stride_block": 1.0}, TypeError, "stride_block=1.0"),
        (llama, {"layer_types": ("full_attention",), "layers": [0]}, ValueError, "layers=.* given with layer_types"),
        (llama, {**PATTERN, "sliding_window": 4}, ValueError, "sliding_window=4 without layer_types"),
        (llama, {**PATTERN, "stride": 3}, ValueError, "stride=3 without layer_types"),
        (llama, {**PATTERN, "stride_block": 2}, ValueError, "stride_block=2 without layer_types"),
        (llama, {}, ValueError, "segment_lengths=None: expected an int, or one per branch"),
        (llama, {"segment_lengths": 8}, ValueError, "dilation_rates=None: expected an int, or one per branch"),
        (gemma3, {"layer_types": ("strided_attention",)}, ValueError, "rotates queries and keys by a layer's own type"),
        (
            lambda: gemma3(attn_logit_softcapping=20.0),
            {"layer_types": ("full_attention",)},
            ValueError,
            "soft-caps its scores",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(make_model: Any, options: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    before = model.config.to_dict()
    with pytest.raises(error, match=message):
        apply(model, **options)
    assert model.config.to_dict() == before
