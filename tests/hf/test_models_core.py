"""LongNets of longnet.hf against the plain library: masks, packed documents, caches, bad input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from longnet_models import MODELS, config, first, labels, make, tokens
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)
from transformers.modeling_layers import GenericForSequenceClassification

import longnet
from longnet.hf import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
)
from longnet.hf.modeling import LongNetPreTrainedModel
from longnet.hf.transformers_internals import CACHE

CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-9}


def decoder(**changes: Any) -> Any:
    return make(**changes).double()


def test_auto_classes() -> None:
    for auto, name in (
        (AutoModel, LongNetModel),
        (AutoModelForCausalLM, LongNetForCausalLM),
        (AutoModelForSequenceClassification, LongNetForSequenceClassification),
    ):
        assert type(auto.from_config(config())) is name
    assert type(AutoModelForMaskedLM.from_config(config(is_causal=False))) is LongNetForMaskedLM


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "norm": "rms"}, {"use_xpos": False, "use_rel_pos_bias": True}]
)
def test_logits_and_gradients_are_the_plain_models(changes: dict[str, Any]) -> None:
    model, ids = decoder(**changes), tokens(2, 50)
    plain = longnet.LongNetLM(model.config.to_longnet()).double()
    plain.load_state_dict({k.removeprefix("model.stack."): v for k, v in model.state_dict().items() if "stack" in k})
    logits = model(ids).logits
    torch.testing.assert_close(logits, plain(ids), **CLOSE)
    model(ids, labels=ids).loss.backward()
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    plain.loss(ids, targets).backward()
    ours = model.model.stack.blocks[0].attention.k_proj.weight.grad
    # transformers' loss is taken in float32.
    torch.testing.assert_close(ours, plain.blocks[0].attention.k_proj.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right", "both", "row of its own"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForMaskedLM"])
def test_padding_is_the_plain_librarys(side: str, kind: torch.dtype, name: str) -> None:
    model, ids = make(name).double(), tokens(3, 40)
    place = torch.arange(40)
    real = {
        "left": (place >= 5).expand(3, -1),
        "right": (place < 33).expand(3, -1),
        "both": ((place >= 3) & (place < 30)).expand(3, -1),
        "row of its own": place >= torch.tensor([[0], [7], [20]]),
    }[side]
    plain = longnet.LongNetLM if name == "LongNetForCausalLM" else longnet.LongNetEncoder
    reference = plain(model.config.to_longnet()).double().eval()
    reference.load_state_dict(
        {k.removeprefix("model.stack."): v for k, v in model.state_dict().items() if "stack" in k}
    )
    hidden = reference.hidden(ids, ~real) if name == "LongNetForCausalLM" else reference(ids, ~real)
    given = first(model.base_model, input_ids=ids, attention_mask=real.to(kind))
    torch.testing.assert_close(given[real], hidden.detach()[real], **CLOSE)
    other = torch.where(real, ids, 3)
    assert torch.equal(first(model.base_model, input_ids=other, attention_mask=real.to(kind))[real], given[real])


@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForSequenceClassification"])
def test_embeddings_of_padding_reach_no_gradient(name: str) -> None:
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = mask[1, 30:] = 0
    labels = torch.tensor([1, 0]) if "Sequence" in name else ids.masked_fill(mask == 0, -100)
    results = []
    for fill in (0.5, torch.nan):
        model = make(name)
        embeds = model.get_input_embeddings()(ids).detach()
        embeds = embeds.masked_fill(mask[..., None] == 0, fill).requires_grad_()
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), embeds.grad, *grads])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want) and want.any()
    assert not results[1][1][mask == 0].any()


def test_a_mask_of_ones_is_no_mask() -> None:
    model, ids = decoder(), tokens()
    assert torch.equal(first(model, input_ids=ids, attention_mask=torch.ones_like(ids)), first(model, input_ids=ids))


@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForMaskedLM"])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_do_not_see_each_other(name: str, padded: bool) -> None:
    """Position ids that start again begin documents; each gives what it gives alone."""
    model, ids = make(name).double(), tokens(2, 40)
    lengths = [[9, 21, 10], [40]]
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 36:] = 0
    given = first(model, input_ids=ids, position_ids=places, attention_mask=mask)
    for row, lengths_of_row in enumerate(lengths):
        start = 0
        for length in lengths_of_row:
            part = slice(start, min(start + length, 36 if padded and row == 0 else 40))
            alone = first(model, input_ids=ids[row : row + 1, part])
            torch.testing.assert_close(given[row : row + 1, part], alone, **CLOSE)
            start += length
    states = model(ids, position_ids=places, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(2, 40, 32)] * 3


@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForMaskedLM"])
def test_boundaries_say_what_position_ids_say(name: str) -> None:
    model, ids = make(name).double(), tokens(1, 40)
    places = torch.cat([torch.arange(25), torch.arange(15)])[None]
    bounds = torch.tensor([0, 25, 40], dtype=torch.int32)
    expected = first(model, input_ids=ids, position_ids=places)
    for more in ({}, {"position_ids": places, "cu_seq_lens_k": bounds, "max_length_q": 25, "max_length_k": 25}):
        assert torch.equal(first(model, input_ids=ids, cu_seq_lens_q=bounds, **more), expected)
    assert (first(model, input_ids=ids) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="end at N = 40"):
        model(ids, cu_seq_lens_q=bounds[:2])
    with pytest.raises(ValueError, match="cu_seq_lens_q with B = 2: expected documents packed into one row"):
        model(tokens(2, 40), cu_seq_lens_q=bounds)


@pytest.mark.parametrize("name", ["global_attention_mask", "head_mask", "encoder_hidden_states", "seq_idx"])
def test_inputs_of_other_models_are_refused(name: str) -> None:
    model, ids = make(), tokens(1, 40)
    assert torch.equal(first(model, input_ids=ids, **{name: None}), first(model, input_ids=ids))
    with pytest.raises(ValueError, match=f"{name} given: (a LongNet has no use for it|expected position_ids)"):
        model(ids, **{name: torch.ones(1, 40)})
    if name == "seq_idx":
        model(ids, position_ids=torch.arange(40)[None], seq_idx=torch.zeros(1, 40))


@pytest.mark.parametrize("name", MODELS)
def test_a_misspelt_keyword_is_refused(name: str) -> None:
    model, ids = make(name), tokens(1, 40)
    for misspelt, expected in (("cu_seqlens", "cu_seq_lens_q"), ("attention_masks", "attention_mask")):
        with pytest.raises(ValueError, match=f"{misspelt} is no keyword of .*: expected {expected}"):
            model(ids, **{misspelt: torch.tensor([0, 40])})
    given = {"num_items_in_batch": 40, "max_length_q": 40, "of_mine": 1, "cu_seqlens": None}
    assert torch.equal(first(model, input_ids=ids, **given), first(model, input_ids=ids))


@pytest.mark.parametrize("name", MODELS)
def test_a_config_may_ask_for_tuples(name: str) -> None:
    model, ids = make(name), tokens()
    expected = first(model, input_ids=ids)
    model.config.return_dict = False
    given = model(ids)
    assert isinstance(given, tuple) and torch.equal(given[0], expected)


def test_packed_documents_train() -> None:
    model, ids = decoder(), tokens(1, 40)
    places = torch.cat([torch.arange(25), torch.arange(15)])[None]
    model.train()(ids, position_ids=places, labels=ids).loss.backward()
    expected = model.model.stack.blocks[0].attention.v_proj.weight.grad.clone()
    model.zero_grad()
    (model.model.stack).gradient_checkpointing = True
    model(ids, position_ids=places, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.stack.blocks[0].attention.v_proj.weight.grad, expected, **CLOSE)


def test_positions_that_only_go_up_change_nothing() -> None:
    model, ids = decoder(), tokens(2, 30)
    mask = (torch.arange(30) >= torch.tensor([[0], [4]])).long()
    # What generate makes of a left-padded batch.
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = first(model, input_ids=ids, attention_mask=mask)
    assert torch.equal(first(model, input_ids=ids, attention_mask=mask, position_ids=places), expected)
    assert torch.equal(
        first(model, input_ids=ids, position_ids=torch.arange(30)[None] + 7), first(model, input_ids=ids)
    )


@pytest.mark.parametrize("cut", [[40], [1] * 40, [8, 32], [13, 1, 1, 25]])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_changes_no_logits(cut: list[int], padded: bool) -> None:
    model, ids = decoder(), tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([[0], [5 if padded else 0]])).long()
    expected = first(model, input_ids=ids, attention_mask=mask)
    cache, start, given = LongNetCache(), 0, []
    for length in cut:
        end = start + length
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        given.append(out.logits)
        start = end
    torch.testing.assert_close(torch.cat(given, 1)[mask == 1], expected[mask == 1], **CLOSE)
    assert cache.get_seq_length() == 40 and cache.batch_size == 2


def test_use_cache_returns_one_to_go_on_from() -> None:
    model, ids = decoder(), tokens(2, 30)
    begun = model(ids[:, :20], use_cache=True)
    rest = model(ids[:, 20:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(rest, first(model, input_ids=ids)[:, 20:], **CLOSE)
    # Without being asked forward keeps none: it would keep no graph either.
    assert model(ids).past_key_values is None and model(ids).logits.requires_grad


def read(model: Any, ids: Tensor, cache: LongNetCache) -> Tensor:
    return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("wrong", [1, 3, 7, 12, 30])
@pytest.mark.parametrize("before", [5, 16, 21, 40])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_taken_back_was_never_read(wrong: int, before: int, at_once: bool) -> None:
    model, ids, other = decoder(), tokens(2, before + 15), tokens(2, wrong, seed=9)
    cache = LongNetCache(rewindable=True)
    pieces = [torch.cat([ids[:, :before], other], 1)] if at_once else [ids[:, :before], *other.split(1, 1)]
    for piece in pieces:
        read(model, piece, cache)
    cache.crop(-wrong)
    assert cache.get_seq_length() == before
    given = read(model, ids[:, before : before + 7], cache)
    expected = first(model, input_ids=ids)
    torch.testing.assert_close(given, expected[:, before : before + 7], **CLOSE)
    # Once more, further back than the last read.
    cache.crop(torch.tensor(-9))  # type: ignore[arg-type]  # as transformers 5.17 says it
    torch.testing.assert_close(read(model, ids[:, before - 2 :], cache), expected[:, before - 2 :], **CLOSE)


def test_states_to_go_back_to_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet.hf.cache._STRIDE", 6)
    model, ids = decoder(), tokens(1, 60)
    cache = LongNetCache(rewindable=True)
    for piece in ids.split(1, 1):
        read(model, piece, cache)
    assert len(cache._states) == 2 and sum(part.x.shape[1] for part in cache._since) <= 12
    cache.crop(-6)
    torch.testing.assert_close(read(model, ids[:, 54:], cache), first(model, input_ids=ids)[:, 54:], **CLOSE)
    with pytest.raises(ValueError, match="crop to 3 tokens: expected at least"):
        cache.crop(-57)


@pytest.mark.parametrize("stride", [4, 10])
def test_reading_and_taking_back_in_any_order(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is kept while tokens are read which are then taken back is not one to go back to."""
    monkeypatch.setattr("longnet.hf.cache._STRIDE", stride)
    model, draw = decoder(), torch.Generator().manual_seed(stride)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    for seed in range(20):
        cache, kept, furthest = LongNetCache(rewindable=True), tokens(1, 0), 0
        for step in range(25):
            new = tokens(1, number(1, 6), seed=100 * seed + step)
            kept = torch.cat([kept, new], 1)
            with torch.no_grad():
                given = read(model, new, cache)
            torch.testing.assert_close(given, first(model, input_ids=kept)[:, -new.shape[1] :], **CLOSE)
            furthest = max(furthest, kept.shape[1])
            keep = number(max(1, furthest - stride), kept.shape[1])
            cache.crop(keep - kept.shape[1])
            kept = kept[:, :keep]


def test_a_plain_cache_goes_back_inside_a_segment_only() -> None:
    model, ids = decoder(), tokens(1, 22)
    cache = LongNetCache()
    read(model, ids, cache)
    cache.crop(-4)
    torch.testing.assert_close(read(model, ids[:, 18:], cache), first(model, input_ids=ids)[:, 18:], **CLOSE)
    with pytest.raises(ValueError, match="rewindable=True"):
        cache.crop(-7)
    with pytest.raises(ValueError, match="tokens_to_remove=5"):
        cache.crop(5)
    with pytest.raises(ValueError, match="tokens_to_remove=-23"):
        cache.crop(-23)
    assert cache.get_seq_length() == 22


def test_rows_are_reordered_with_what_may_be_taken_back() -> None:
    model, ids = decoder(), tokens(3, 30)
    cache = LongNetCache(rewindable=True)
    read(model, ids[:, :26], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    cache.crop(-6)
    torch.testing.assert_close(read(model, ids[order, 20:], cache), first(model, input_ids=ids[order])[:, 20:], **CLOSE)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_saved_cache_goes_on(way: str, tmp_path: Path) -> None:
    model, ids = decoder(), tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([[0], [5]])).long()
    cache = LongNetCache(rewindable=True)
    model(ids[:, :27], attention_mask=mask[:, :27], past_key_values=cache)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(cache))
    else:
        torch.save(cache, tmp_path / "cache.pt")
        again = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert again.get_seq_length() == 27 and again.nbytes == cache.nbytes and again.rewindable
    # Tokens are taken back before a model has used the loaded cache: the model then reads the rest again.
    early = copy.deepcopy(again)
    early.crop(-9)
    early.crop(-6)
    assert early.get_seq_length() == 12
    given = model(ids[:, 12:], attention_mask=mask, past_key_values=early).logits
    expected = first(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(given, expected[:, 12:], **CLOSE)
    given = model(ids[:, 27:], attention_mask=mask, past_key_values=again).logits
    torch.testing.assert_close(given, expected[:, 27:], **CLOSE)
    again.crop(-25)
    given = model(ids[:, 15:], attention_mask=mask, past_key_values=again).logits
    torch.testing.assert_close(given, expected[:, 15:], **CLOSE)
    assert cache.get_seq_length() == 27


def test_a_cache_that_was_taken_back_is_saved_copied_and_reordered() -> None:
    model, ids = decoder(), tokens(3, 30)
    cache = LongNetCache(rewindable=True)
    read(model, ids[:, :26], cache)
    cache.crop(-6)
    again = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    order = torch.tensor([2, 0, 0])
    again.reorder_cache(order)
    assert again.get_seq_length() == 20
    torch.testing.assert_close(read(model, ids[order, 20:], again), first(model, input_ids=ids[order])[:, 20:], **CLOSE)
    again.crop(-1)
    again.reset()
    assert again.get_seq_length() == 0
    torch.testing.assert_close(read(model, ids, again), first(model, input_ids=ids), **CLOSE)
    # What is left is read again by the next read, or where that fails by the one after it.
    handle = model.model.stack.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        read(model, ids[:, 20:], cache)
    handle.remove()
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(read(model, ids[:, 20:], cache), first(model, input_ids=ids)[:, 20:], **CLOSE)


def test_a_saved_cache_continues_in_generate() -> None:
    model, ids = decoder(), tokens(1, 20)
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cache = LongNetCache()
    read(model, ids[:, :-1], cache)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(
        model.generate(ids, **{CACHE: again}, max_new_tokens=6, min_new_tokens=6, do_sample=False), expected
    )


@pytest.mark.parametrize("changes", [{"segment_lengths": (8, 16)}, {"xpos_scale_base": 700.0}])
def test_a_saved_cache_of_another_pattern_is_refused(changes: dict[str, Any]) -> None:
    cache = LongNetCache()
    read(decoder(), tokens(1, 12), cache)
    again = pickle.loads(pickle.dumps(cache))
    other = decoder(**changes)
    with pytest.raises(ValueError, match=f"past_key_values was read by a model of .*{next(iter(changes))}"):
        read(other, tokens(1, 3), again)
    # What the model computes is the same: a resized vocabulary, another backend.
    assert read(decoder(vocab_size=80, backend="portable"), tokens(1, 3), again).shape == (1, 3, 80)


def test_a_copied_cache_keeps_its_model() -> None:
    model, ids = decoder(), tokens(1, 30)
    cache = LongNetCache(rewindable=True)
    read(model, ids, cache)
    again = copy.deepcopy(cache)
    again.crop(-25)
    torch.testing.assert_close(read(model, ids[:, 5:], again), first(model, input_ids=ids)[:, 5:], **CLOSE)
    with pytest.raises(ValueError, match="another model"):
        read(decoder(), ids, again)


def test_a_cache_of_a_known_length_is_smaller_and_ends_there() -> None:
    model, ids = decoder(segment_lengths=(8, 512)), tokens(1, 20)
    long, short = LongNetCache(), LongNetCache(max_length=20)
    torch.testing.assert_close(read(model, ids, short), read(model, ids, long), **CLOSE)
    assert short.nbytes < long.nbytes / 4 and short.get_max_length() == 20 and long.get_max_length() == -1
    with pytest.raises(ValueError, match="1 tokens after 20: expected no more than max_length=20"):
        read(model, ids[:, :1], short)
    short.reset()
    assert short.get_seq_length() == 0 and not short.is_initialized
    read(model, tokens(2, 20), short)


def test_caches_that_do_not_fit_are_refused() -> None:
    model, ids = decoder(), tokens(1, 5)
    cache = LongNetCache()
    read(model, ids, cache)
    with pytest.raises(ValueError, match="another model"):
        read(decoder(), ids, cache)
    with pytest.raises(ValueError, match="batch|shape"):
        read(model, tokens(2, 5), cache)
    with pytest.raises(TypeError, match="past_key_values has type DynamicCache: expected a longnet.hf.LongNetCache"):
        read(model, ids, DynamicCache())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in training"):
        model.train()(ids, use_cache=True)
    with pytest.raises(ValueError, match="causal"):
        make("LongNetForMaskedLM").base_model(ids, use_cache=True)
    with pytest.raises(ValueError, match="use_rel_pos_bias"):
        make(use_rel_pos_bias=True, use_xpos=False)(ids, use_cache=True)
    model.eval()
    with pytest.raises(ValueError, match="first real token"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]), use_cache=True)
    with pytest.raises(ValueError, match="start again"):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=True)
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0], past_key_values=cache)
    with pytest.raises(ValueError, match="given to another model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize("causal", [True, False])
def test_classes_of_padded_rows(causal: bool) -> None:
    """The last real token of a decoder, the mean of an encoder's real tokens; padding on either side."""
    model = make("LongNetForSequenceClassification", is_causal=causal).double()
    ids = tokens(2, 32)
    # A period of padding on the left leaves every token its place in its segments.
    padded = torch.cat([torch.zeros(2, 32, dtype=torch.int64), ids, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.zeros_like(padded)
    mask[:, 32:64] = 1
    given = first(model, input_ids=padded, attention_mask=mask)
    torch.testing.assert_close(given, first(model, input_ids=ids), **CLOSE)
    hidden = model.model(ids).last_hidden_state
    pooled = hidden[:, -1] if causal else hidden.mean(1)
    torch.testing.assert_close(given, model.score(pooled).detach(), **CLOSE)


def test_a_decoder_classifies_the_last_id_that_is_no_padding() -> None:
    """Without a mask, as transformers' own classifiers: the last id that is not ``pad_token_id``."""
    ids = torch.cat([tokens(3, 24), torch.zeros(3, 8, dtype=torch.int64)], 1)
    ids[1] = tokens(1, 32)[0]
    ids[2] = ids[2].roll(8)
    model = make("LongNetForSequenceClassification").double()
    generic = type("Generic", (GenericForSequenceClassification, LongNetPreTrainedModel), {})(model.config).double()
    generic.load_state_dict(model.state_dict())
    given = first(model, input_ids=ids)
    torch.testing.assert_close(given, first(generic.eval(), input_ids=ids), **CLOSE)
    alone = torch.cat([first(model, input_ids=row[None]) for row in (ids[0, :24], ids[1], ids[2])])
    torch.testing.assert_close(given, alone, **CLOSE)
    torch.testing.assert_close(first(model, input_ids=ids.int()), given, **CLOSE)
    # Embeddings do not say which are padding, and neither does a config without a pad token.
    model.config.pad_token_id = None
    last = model.score(model.model(ids).last_hidden_state[:, -1]).detach()
    torch.testing.assert_close(first(model, input_ids=ids), last, **CLOSE)
    assert (last - given)[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment_lengths": (8, 32), "dilation_rates": (1,)}, "segment_lengths"),
        ({"dilation_rates": (1, 64)}, "dilation_rate|rate"),
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected at least 1"),
        ({"is_causal": 1}, "is_causal=1 has type int"),
        ({"norm": "none"}, "norm='none'"),
        ({"head_offsets": "odd"}, "head_offsets='odd'"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        config(**changes)


def test_models_say_which_config_they_need() -> None:
    with pytest.raises(ValueError, match="is_causal=False: expected a decoder"):
        LongNetForCausalLM(config(is_causal=False))
    with pytest.raises(ValueError, match="is_causal=True: expected an encoder"):
        LongNetForMaskedLM(config())
    with pytest.raises(ValueError, match="norm='batch'"):
        LongNetConfig(norm="batch")


@pytest.mark.parametrize("name", MODELS)
def test_int32_tokens_and_labels(name: str) -> None:
    model, ids = make(name), tokens()
    goals = {} if name == "LongNetModel" else {"labels": labels(name, ids)}
    expected = model(ids, **goals)
    given = model(ids.int(), attention_mask=torch.ones_like(ids).int(), **{k: x.int() for k, x in goals.items()})
    assert torch.equal(given[0], expected[0]) and torch.equal(given[len(goals)], expected[len(goals)])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_int32_tokens_generate(mode: dict[str, Any]) -> None:
    model, ids = make(), tokens(1, 12)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **mode}
    assert torch.equal(model.generate(ids.int(), **options), model.generate(ids, **options))


def test_bad_tokens_are_refused() -> None:
    model = make()
    with pytest.raises(TypeError, match="input_ids has dtype torch.int16"):
        model(tokens().short())
    with pytest.raises(ValueError, match="input_ids holds the ids"):
        model(tokens() + 40)
    with pytest.raises(ValueError, match="inputs_embeds has shape"):
        model(inputs_embeds=torch.randn(1, 4, 31))


@pytest.mark.parametrize("place", ["blocks.0.feed_forward", "blocks.1.feed_forward", "norm"])
def test_a_cache_whose_layers_read_in_part_refuses_to_go_on(place: str) -> None:
    model, ids = decoder(), tokens(2, 40)
    cache = LongNetCache(rewindable=True)
    read(model, ids[:, :12], cache)

    def fail(*_: Any) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = model.model.stack.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(model, ids[:, 12:30], cache)
    with pytest.raises(ValueError, match="since an exception came while its layers were read"):
        read(model, ids[:, 12:], cache)


def test_a_failed_read_is_not_read_again_by_taking_back() -> None:
    model, ids = decoder(), tokens(2, 40)
    cache = LongNetCache(rewindable=True)
    read(model, ids[:, :12], cache)
    handle = model.model.stack.blocks[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        read(model, ids[:, 20:30], cache)
    handle.remove()
    read(model, ids[:, 12:35], cache)
    cache.crop(-5)
    torch.testing.assert_close(read(model, ids[:, 30:], cache), first(model, input_ids=ids)[:, 30:], **CLOSE)


@pytest.mark.filterwarnings("error:a row is padded on the left")
def test_a_row_padded_on_the_left_is_what_it_is_alone() -> None:
    model, ids, mask = decoder(), tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 5:], model(input_ids=ids[:1, 5:]).logits[0], **CLOSE)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[:1, 5:], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(together[0, 5:], alone[0])
