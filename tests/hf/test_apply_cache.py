"""Dilated decoders of Hugging Face generate from a bounded cache, exactly."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from apply_models import DECODERS, inputs, logits, make
from transformers import DynamicCache

from longnet.hf import BoundedCache, apply
from longnet.hf.transformers_internals import CACHE

SEGMENTS, RATES = (8, 24), (1, 3)


def dilated(name: str, **options: Any) -> Any:
    return apply(make(name).double(), SEGMENTS, RATES, **options)


@pytest.mark.parametrize("kind", ["bounded", "dynamic"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", DECODERS)
def test_chunks_give_the_logits_of_one_forward(name: str, layers: Any, kind: str) -> None:
    model, ids = dilated(name, layers=layers), inputs(name)["input_ids"]
    expected = logits(model, {"input_ids": ids}, use_cache=False)
    cache = BoundedCache(model) if kind == "bounded" else DynamicCache(config=model.config)
    chunks = ids.split([13, 1, 1, 20, 15], 1)
    got = torch.cat([logits(model, {"input_ids": chunk}, **{CACHE: cache}) for chunk in chunks], 1)
    assert (got - expected).abs().max() < 1e-9
    assert cache.get_seq_length() == 50


def test_left_padding_goes_through_both_caches() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    real = torch.ones_like(ids)
    real[1, :13] = 0
    expected = logits(model, {"input_ids": ids, "attention_mask": real}, use_cache=False)
    for cache in (BoundedCache(model), DynamicCache(config=model.config)):
        got, stop = [], 0
        for chunk in ids.split([13, 1, 1, 20, 15], 1):
            stop += chunk.shape[1]
            given = {"input_ids": chunk, "attention_mask": real[:, :stop]}
            got.append(logits(model, given, **{CACHE: cache}))
        assert (torch.cat(got, 1) - expected)[real.bool()].abs().max() < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_gives_what_it_gives_without_a_cache(name: str, options: dict[str, Any]) -> None:
    model = dilated(name)
    # Lookup takes one row.
    ids = inputs(name, batch=1 if "prompt_lookup_num_tokens" in options else 2)["input_ids"]
    settings = {"max_new_tokens": 30, "attention_mask": torch.ones_like(ids), **options}
    torch.manual_seed(0)
    got = model.generate(ids, **settings)
    torch.manual_seed(0)
    plain = {key: value for key, value in settings.items() if key != "prompt_lookup_num_tokens"}
    assert torch.equal(got, model.generate(ids, use_cache=False, **plain))


def test_generate_takes_a_left_padded_batch() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    real = torch.ones_like(ids)
    real[1, :13] = 0
    settings = {"max_new_tokens": 30, "attention_mask": real, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_the_cache_does_not_grow_and_goes_on() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    five, more, all_ = ({"max_new_tokens": n, "min_new_tokens": n, "do_sample": False} for n in (5, 60, 65))
    out = model.generate(ids, return_dict_in_generate=True, **five)
    cache = out[CACHE]
    assert isinstance(cache, BoundedCache)
    size = cache.nbytes
    assert size > 0
    longer = model.generate(out.sequences, **{CACHE: cache}, **more)
    assert cache.nbytes == size and cache.get_seq_length() == 50 + 5 + 60 - 1
    assert torch.equal(longer, model.generate(ids, use_cache=False, **all_))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **five), out.sequences)


def test_generate_works_under_autocast() -> None:
    model, ids = apply(make("llama"), SEGMENTS, RATES), inputs("llama")["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
        expected = logits(model, {"input_ids": ids}, use_cache=False)[:, -1]
        got = logits(model, {"input_ids": ids}, **{CACHE: BoundedCache(model)})[:, -1]
    assert out[CACHE].layers[0].cache.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 0.05


def test_a_cache_of_its_own_is_taken() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    out = model.generate(
        ids, max_new_tokens=3, **{CACHE: DynamicCache(config=model.config)}, return_dict_in_generate=True
    )
    assert isinstance(out[CACHE], DynamicCache)


def test_what_a_cache_cannot_hold_is_refused() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    with pytest.raises(ValueError, match=r"expected longnet.hf.BoundedCache\(model\) or a DynamicCache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="is not dilated"):
        BoundedCache(make("llama"))
    with pytest.raises(ValueError, match="attends to later tokens"):
        BoundedCache(apply(make("bert"), 8, 1))
    with pytest.raises(ValueError, match="requires a gradient and a cache holds no graph"):
        model(input_ids=ids, **{CACHE: BoundedCache(model)})
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with pytest.raises(ValueError, match="a cache holds one document a row"):
        logits(model, {"input_ids": ids}, position_ids=positions, **{CACHE: BoundedCache(model)})
    dynamic = DynamicCache(config=model.config)
    logits(model, {"input_ids": ids}, **{CACHE: dynamic})
    with pytest.raises(ValueError, match="a cache holds one document a row"):
        logits(model, {"input_ids": ids}, position_ids=positions, **{CACHE: dynamic})
    real = torch.ones_like(ids)
    real[0, -3:] = 0
    with pytest.raises(ValueError, match="a stream takes padding before a row's first real token only"):
        logits(model, {"input_ids": ids, "attention_mask": real}, **{CACHE: BoundedCache(model)})


def test_a_bounded_cache_in_another_model_is_noticed() -> None:
    cache, other, ids = BoundedCache(dilated("llama")), make("llama").double(), inputs("llama")["input_ids"]
    logits(other, {"input_ids": ids}, **{CACHE: cache})
    with pytest.raises(ValueError, match="tokens that no attention has read"):
        logits(other, {"input_ids": ids[:, :1]}, **{CACHE: cache})


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("read", [0, 13])
def test_a_forward_that_raised_between_two_layers_is_noticed(read: int, layers: Any) -> None:
    model, ids = dilated("llama", layers=layers), inputs("llama")["input_ids"]
    cache = BoundedCache(model)
    if read:
        logits(model, {"input_ids": ids[:, :read]}, **{CACHE: cache})
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logits(model, {"input_ids": ids[:, read:40]}, **{CACHE: cache})
    handle.remove()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"layer 1 of the cache stands at position {read} and an earlier one at"):
            logits(model, {"input_ids": ids[:, read:]}, **{CACHE: cache})
    if layers is None:
        cache.reset()
        got = logits(model, {"input_ids": ids}, **{CACHE: cache})
        assert (got - logits(model, {"input_ids": ids}, use_cache=False)).abs().max() < 1e-9


def test_a_bounded_cache_is_cropped_within_a_segment() -> None:
    model, ids = dilated("llama"), inputs("llama", batch=1)["input_ids"]
    expected = logits(model, {"input_ids": ids}, use_cache=False)
    cache = BoundedCache(model)
    logits(model, {"input_ids": ids[:, :34]}, **{CACHE: cache})
    logits(model, {"input_ids": ids[:, :5].flip(1)}, **{CACHE: cache})
    cache.crop(-5)
    cache.crop(0)
    got = logits(model, {"input_ids": ids[:, 34:]}, **{CACHE: cache})
    assert (got - expected[:, 34:]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="crop to 45 of 50 tokens: a segment has ended since"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="tokens_to_remove=-51: expected -50 to 0"):
        cache.crop(-51)
    padded = BoundedCache(model)
    real = torch.tensor([[0, 0, 0, 1, 1]])
    logits(model, {"input_ids": ids[:, :5], "attention_mask": real}, **{CACHE: padded})
    with pytest.raises(ValueError, match="crop to 1 of 5 tokens: some are padding"):
        padded.crop(-4)
    assert padded.get_seq_length() == 5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prefix_tuning_generates() -> None:
    model, ids = dilated("llama"), inputs("llama")["input_ids"]
    model.generation_config.eos_token_id = None
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned: Any = peft.get_peft_model(model, config).double().eval()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if CACHE == "cache":
        # PEFT gives the prefix as past_key_values, which this transformers ignores beside its own cache.
        with pytest.raises(ValueError, match="cache and past_key_values are both given"):
            tuned.generate(**given, max_new_tokens=9, do_sample=False)
        return
    out = tuned.generate(**given, max_new_tokens=9, do_sample=False)
    for _ in range(9):
        token = logits(tuned, given)[:, -1:].argmax(-1)
        given = {
            name: torch.cat([x, token if name == "input_ids" else torch.ones_like(token)], 1)
            for name, x in given.items()
        }
    assert torch.equal(out, given["input_ids"])


def test_a_layer_that_attends_twice_is_refused_a_bounded_cache() -> None:
    config = transformers.DiffLlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = (
        apply(transformers.DiffLlamaForCausalLM(config).double().eval(), SEGMENTS, RATES),
        inputs("llama")["input_ids"],
    )
    with pytest.raises(ValueError, match="calls its attention function more than once"):
        model.generate(ids, max_new_tokens=3)
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    got = model.generate(ids, **{CACHE: DynamicCache(config=config)}, **settings)
    assert torch.equal(got, model.generate(ids, use_cache=False, **settings))
