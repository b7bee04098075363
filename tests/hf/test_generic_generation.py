"""What transformers' own tests ask of every model that generates (its GenerationTesterMixin). Own code, the same checks.

``CHECKS`` says where each of theirs is answered here, or why it is not.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, ClassVar

import pytest
import torch
from longnet_models import VOCABULARY, make, tokens
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, set_seed

from longnet.hf.transformers_internals import CACHE

# Their test: our test in this module, or the reason why there is none.
CHECKS = {
    "test_assisted_decoding_matches_greedy_search_0_random": "test_assisted_is_greedy",
    "test_assisted_decoding_matches_greedy_search_1_same": "test_assisted_is_greedy",
    "test_assisted_decoding_sample": "test_assisted_samples",
    "test_attention_mask_preparation, test_custom_4d_attention_mask": "skip: in test_generic_models.py",
    "test_beam_sample_generate": "test_modes_do_not_depend_on_the_cache",
    "test_beam_sample_generate_dict_output": "test_outputs_by_step",
    "test_beam_search_generate": "test_modes_do_not_depend_on_the_cache",
    "test_beam_search_generate_dict_output": "test_outputs_by_step",
    "test_beam_search_generate_dict_outputs_use_cache": "test_outputs_by_step",
    "test_constrained_*, test_contrastive_*, test_dola_*, test_group_beam_*": "skip: removed from transformers 5",
    "test_eager_matches_*_generate, test_flash_attention_2_continue_*": "skip: attention is LongNet's own",
    "test_generate_compilation_all_outputs": "skip: a bounded cache is not one that generate compiles by itself",
    "test_generate_compile_model_forward_fullgraph": "skip: a bounded cache is not one that generate compiles by itself",
    "test_generate_continue_from_inputs_embeds": "test_it_goes_on_from_a_cache",
    "test_generate_continue_from_past_key_values": "test_it_goes_on_from_a_cache",
    "test_generate_from_inputs_embeds_0_greedy": "test_from_embeddings",
    "test_generate_from_inputs_embeds_1_beam_search": "test_from_embeddings",
    "test_generate_from_inputs_embeds_with_static_cache": "test_from_embeddings",
    "test_generate_from_random_inputs_embeds": "test_from_embeddings",
    "test_generate_methods_with_logits_to_keep": "test_modes_do_not_depend_on_the_cache",
    "test_generate_with_and_without_position_ids": "test_positions_change_nothing",
    "test_generate_with_quant_cache": "test_other_caches_are_refused",
    "test_generate_with_static_cache": "test_a_static_cache_is_a_bounded_one",
    "test_generate_without_input_ids": "test_without_a_prompt",
    "test_generation_config_*": "test_the_generation_config_is_saved",
    "test_greedy_generate": "test_modes_do_not_depend_on_the_cache",
    "test_greedy_generate_dict_outputs": "test_outputs_by_step",
    "test_greedy_generate_dict_outputs_use_cache": "test_outputs_by_step",
    "test_inherits_generation_mixin": "test_it_generates_by_the_mixin",
    "test_left_padding_compatibility": "test_left_padding",
    "test_past_key_values_format": "test_the_cache_is_bounded",
    "test_prepare_inputs_for_generation_kwargs_forwards": "test_arguments_of_forward_pass_through",
    "test_prompt_lookup_decoding_matches_greedy_search": "test_assisted_is_greedy",
    "test_prompt_lookup_decoding_stops_at_eos": "test_prompt_lookup_stops_at_the_end",
    "test_sample_generate": "test_modes_do_not_depend_on_the_cache",
    "test_sample_generate_dict_output": "test_outputs_by_step",
    "test_stopping_criteria, test_stop_sequence": "test_stopping",
    "test_chunked_prefill": "test_a_prompt_may_be_read_in_chunks",
}  # fmt: skip

# A prompt that fills segments and leaves one begun, and steps that cross two boundaries of the shorter segment of 8.
LENGTH, NEW = 21, 14
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 10, "top_p": 0.9, "temperature": 0.7},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"num_beams": 2, "do_sample": True},
}
QUIET: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    # In double precision rounding cannot decide between two tokens.
    return make().double()


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    set_seed(3)
    return model.generate(ids, **{**QUIET, **options})


def test_the_table_names_tests_that_exist() -> None:
    assert all(callable(globals().get(answer)) for answer in CHECKS.values() if not answer.startswith("skip: "))


def test_it_generates_by_the_mixin(model: Any) -> None:
    assert isinstance(model, GenerationMixin) and model.can_generate()
    assert not make("LongNetForMaskedLM").can_generate() and not make("LongNetModel").can_generate()


@pytest.mark.parametrize("mode", MODES)
def test_modes_do_not_depend_on_the_cache(model: Any, mode: str) -> None:
    ids = tokens(2, LENGTH)
    cached = generate(model, ids, **MODES[mode])
    assert cached.shape == (2 * MODES[mode].get("num_return_sequences", 1), LENGTH + NEW)
    assert torch.equal(cached, generate(model, ids, **MODES[mode], use_cache=False))


def test_greedy_is_the_plain_librarys(model: Any) -> None:
    ids = tokens(2, LENGTH)
    assert torch.equal(generate(model, ids), model.to_longnet().generate(ids, NEW, temperature=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_outputs_by_step(model: Any, mode: str, use_cache: bool) -> None:
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
    }
    given = generate(model, tokens(1, LENGTH), **MODES[mode], **options, use_cache=use_cache)
    rows = max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))
    assert len(given.scores) == len(given.logits) == len(given.hidden_states) == NEW
    assert given.scores[0].shape == (rows, VOCABULARY)
    steps = [step[-1].shape[1] for step in given.hidden_states]
    assert steps == ([LENGTH, *[1] * (NEW - 1)] if use_cache else [LENGTH + step for step in range(NEW)])
    assert (given.past_key_values is not None) == use_cache


def test_the_cache_is_bounded(model: Any) -> None:
    given = generate(model, tokens(1, LENGTH), return_dict_in_generate=True)
    cache = given.past_key_values
    before = cache.nbytes
    assert cache.get_seq_length() == LENGTH + NEW - 1
    with torch.no_grad():
        model(tokens(1, 100), past_key_values=cache)
    assert cache.nbytes == before > 0 and cache.get_seq_length() == LENGTH + NEW + 99


@pytest.mark.parametrize("kind", ["itself", "another", "prompt lookup"])
@pytest.mark.parametrize("length", [5, LENGTH])
def test_assisted_is_greedy(model: Any, kind: str, length: int) -> None:
    ids = torch.cat([tokens(1, length), tokens(1, length)[:, :3]], 1)
    helper = model
    if kind == "another":
        torch.manual_seed(5)
        helper = type(model)(model.config).double().eval()
        # It is nearly always wrong: what it adds, over a segment's end, is taken back.
        helper.generation_config.num_assistant_tokens = 10
    options: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 4} if kind == "prompt lookup" else {"assistant_model": helper}
    )
    # Over the end of the longer segment of 32.
    steps = {"max_new_tokens": 28, "min_new_tokens": 28}
    assert torch.equal(generate(model, ids, **steps, **options), generate(model, ids, **steps))


def test_assisted_samples(model: Any) -> None:
    given = generate(model, tokens(1, LENGTH), do_sample=True, assistant_model=model)
    assert given.shape == (1, LENGTH + NEW)


def test_prompt_lookup_stops_at_the_end(model: Any) -> None:
    ids = tokens(1, LENGTH)
    ends = generate(model, ids)[0, LENGTH + 2].item()
    options = {"eos_token_id": ends, "min_new_tokens": None}
    expected = generate(model, ids, **options)
    assert expected.shape[1] <= LENGTH + 3
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=2, **options), expected)


@pytest.mark.parametrize("length", [5, LENGTH])
def test_left_padding(model: Any, length: int) -> None:
    """Padding counts as positions: a padded row's logits are those of one forward over the padded row, at any step."""
    ids, pads = tokens(2, length), 3
    padded = torch.cat([torch.zeros(2, pads, dtype=torch.int64), ids], 1)
    mask = (torch.arange(length + pads) >= pads).long().expand(2, -1)
    given = generate(model, padded, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    longer = torch.cat([mask, mask.new_ones(2, NEW)], 1)
    with torch.no_grad():
        expected = model(given.sequences, attention_mask=longer).logits[:, length + pads - 1 : -1]
    torch.testing.assert_close(torch.stack(given.logits, 1).double(), expected.float().double(), rtol=1e-5, atol=1e-5)


def test_left_padding_of_whole_periods_changes_nothing(model: Any) -> None:
    """The pattern repeats every 32 tokens here: so much padding leaves every token its place in its segments."""
    ids = tokens(2, LENGTH)
    padded = torch.cat([torch.zeros(2, 32, dtype=torch.int64), ids], 1)
    mask = (torch.arange(LENGTH + 32) >= 32).long().expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, attention_mask=mask).logits[:, 32:], model(ids).logits, rtol=1e-9, atol=1e-9
        )
    assert torch.equal(generate(model, padded, attention_mask=mask)[:, 32:], generate(model, ids))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_from_embeddings(model: Any, mode: str, implementation: str | None) -> None:
    ids = tokens(2, LENGTH)
    rows = model.get_input_embeddings()(ids).detach()
    expected = generate(model, ids, **MODES[mode])
    options = {**MODES[mode], "inputs_embeds": rows, "cache_implementation": implementation}
    assert torch.equal(generate(model, ids, **options), expected)
    set_seed(3)
    alone = model.generate(**{**QUIET, **options})
    assert torch.equal(alone, expected[:, LENGTH:])
    other = generate(model, ids, **{**options, "inputs_embeds": torch.randn_like(rows)})
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("given", ["all tokens", "new tokens", "embeddings"])
def test_it_goes_on_from_a_cache(model: Any, given: str) -> None:
    ids = tokens(2, LENGTH)
    expected = generate(model, ids)
    options: dict[str, Any] = {"return_dict_in_generate": True}
    begun = generate(model, ids, max_new_tokens=6, min_new_tokens=6, **options)
    cache = copy.deepcopy(begun.past_key_values)
    assert cache.get_seq_length() == LENGTH + 5
    rest: dict[str, Any] = {"max_new_tokens": NEW - 6, "min_new_tokens": NEW - 6, CACHE: cache}
    if given == "all tokens":
        assert torch.equal(generate(model, begun.sequences, **rest), expected)
    elif given == "new tokens":
        mask = torch.ones_like(begun.sequences)
        went_on = generate(model, begun.sequences[:, -1:], attention_mask=mask, **rest)
        assert torch.equal(went_on[:, 1:], expected[:, LENGTH + 6 :])
    else:
        rows = model.get_input_embeddings()(begun.sequences).detach()
        set_seed(3)
        assert torch.equal(model.generate(inputs_embeds=rows, **{**QUIET, **rest}), expected[:, LENGTH + 6 :])
    # The copy went its own way.
    assert begun.past_key_values.get_seq_length() == LENGTH + 5


def test_a_static_cache_is_a_bounded_one(model: Any) -> None:
    ids = tokens(2, LENGTH)
    given = generate(model, ids, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(given.sequences, generate(model, ids))
    assert type(given.past_key_values).__name__ == "LongNetCache"


class Step:
    """A captured step without a GPU: every call writes its result over the one before."""

    made: ClassVar[list[Step]] = []

    def __init__(self, read: Any, cache: Any, x: torch.Tensor, generators: Any) -> None:
        self.read, self.calls, self.result = read, 0, torch.full_like(x, torch.nan)
        self.made.append(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.result.copy_(self.read(x))


def test_steps_with_a_static_cache_are_captured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet.hf.cache.can_capture", lambda stack, device: True)
    monkeypatch.setattr("longnet.hf.cache.CapturedStep", Step)
    Step.made.clear()
    ids, static = tokens(2, LENGTH), {"cache_implementation": "static", "return_dict_in_generate": True}
    wanted = generate(model, ids)
    assert not Step.made
    given = generate(model, ids, **static)
    assert torch.equal(given.sequences, wanted)
    assert [step.calls for step in Step.made] == [NEW - 1]
    # Hidden states are asked for step by step, and beams change places: both are called.
    generate(model, ids, output_hidden_states=True, **static)
    assert len(Step.made) == 1
    beams = generate(model, ids, num_beams=2, **static)
    assert torch.equal(beams.sequences, generate(model, ids, num_beams=2))
    # After the call the model may change, and a cache may be kept.
    for cache in (given.past_key_values, pickle.loads(pickle.dumps(given.past_key_values))):
        assert cache._step is None and not cache._captures


@pytest.mark.parametrize("implementation", ["quantized", "offloaded"])
def test_other_caches_are_refused(model: Any, implementation: str) -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, tokens(1, LENGTH), cache_implementation=implementation)


def test_without_a_prompt(model: Any) -> None:
    given = model.generate(**QUIET)
    assert given.shape == (1, NEW + 1) and given[0, 0] == model.config.bos_token_id


def test_positions_change_nothing(model: Any) -> None:
    ids = tokens(2, LENGTH)
    places = torch.arange(LENGTH).expand(2, -1)
    assert torch.equal(generate(model, ids, position_ids=places), generate(model, ids))


def test_a_prompt_may_be_read_in_chunks(model: Any) -> None:
    ids = tokens(2, LENGTH)
    assert torch.equal(generate(model, ids, prefill_chunk_size=6), generate(model, ids))


def test_arguments_of_forward_pass_through(model: Any) -> None:
    ids = tokens(1, 5)
    assert {"input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"} <= set(
        inspect.signature(model.forward).parameters
    )
    assert model.prepare_inputs_for_generation(ids, use_cache=False, of_mine=1)["of_mine"] == 1


class _After(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= LENGTH + 3)


def test_stopping(model: Any) -> None:
    ids = tokens(2, LENGTH)
    assert generate(model, ids, stopping_criteria=[_After()]).shape == (2, LENGTH + 3)
    ends = generate(model, ids)[0, LENGTH].item()
    assert generate(model, ids[:1], eos_token_id=ends, min_new_tokens=None).shape == (1, LENGTH + 1)


def test_the_generation_config_is_saved(model: Any, tmp_path: Any) -> None:
    own = copy.deepcopy(model)
    own.generation_config.update(do_sample=True, top_k=7)
    own.save_pretrained(tmp_path)
    again = type(own).from_pretrained(tmp_path).generation_config
    assert again.do_sample and again.top_k == 7
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)


def test_a_model_without_a_cached_form_generates_too() -> None:
    model, ids = make(use_rel_pos_bias=True, use_xpos=False).double(), tokens(2, LENGTH)
    given = generate(model, ids, return_dict_in_generate=True)
    assert given.past_key_values is None
    assert torch.equal(given.sequences, model.to_longnet().generate(ids, NEW, temperature=0))
