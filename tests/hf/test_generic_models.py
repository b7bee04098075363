"""What transformers' own tests ask of every model (its ModelTesterMixin). Own code, the same checks.

``CHECKS`` says where each of theirs is answered here, or why it is not.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import test_generic_saving
import torch
from longnet_models import HEADS, MODELS, VOCABULARY, config, first, labels, make, tokens
from torch import Tensor

# Their test: our test in this module or in test_generic_saving.py, or the reason why there is none.
CHECKS = {
    "test_all_tensors_are_parameter_or_buffer": "test_every_tensor_is_a_parameter_or_a_buffer",
    "test_attention_outputs": "test_attention_weights_are_refused",
    "test_batching_equivalence": "test_a_row_does_not_depend_on_its_batch",
    "test_can_be_initialized_on_meta": "test_it_is_built_on_the_meta_device",
    "test_can_init_all_missing_weights": "test_missing_weights_are_drawn_as_fresh_ones",
    "test_can_load_ignoring_mismatched_shapes": "test_mismatched_shapes_are_refused_or_drawn_afresh",
    "test_can_load_with_device_context_manager": "test_it_loads_under_the_meta_device",
    "test_can_load_with_meta_device_context_manager": "test_it_loads_under_the_meta_device",
    "test_can_set_attention_dynamically": "test_no_other_attention_can_be_asked_for",
    "test_can_use_safetensors": "test_save_and_load",
    "test_capture_outputs_decorator": "test_hidden_states",
    "test_causal_lm_can_accept_kwargs": "test_the_loss_takes_the_trainers_count",
    "test_config": "test_a_config_survives_json",
    "test_config_attn_implementation_setter": "test_no_other_attention_can_be_asked_for",
    "test_correct_missing_keys": "test_tied_weights_are_saved_once_and_not_missed",
    "test_custom_4d_attention_mask": "test_masks_that_cannot_be_honoured_are_refused",
    "test_determinism": "test_determinism",
    "test_eager_matches_fa2_generate": "skip: attention is LongNet's own, there is no second implementation to compare with",
    "test_eager_matches_sdpa_inference": "skip: attention is LongNet's own, there is no second implementation to compare with",
    "test_feed_forward_chunking": "test_feed_forward_chunks_change_nothing",
    "test_forward_signature": "test_forward_begins_with_input_ids",
    "test_forward_with_logits_to_keep": "test_logits_to_keep",
    "test_from_pretrained_no_checkpoint": "test_a_state_dict_loads_without_a_folder",
    "test_gradient_checkpointing_backward_compatibility": "test_gradient_checkpointing_can_be_switched",
    "test_gradient_checkpointing_enable_disable": "test_gradient_checkpointing_can_be_switched",
    "test_hidden_states_output": "test_hidden_states",
    "test_init_weights_can_init_buffers": "skip: no buffer holds anything that is drawn",
    "test_initialization": "test_fresh_weights_are_the_plain_models",
    "test_inputs_embeds": "test_embeddings_in_place_of_tokens",
    "test_inputs_embeds_matches_input_ids": "test_embeddings_in_place_of_tokens",
    "test_keep_in_fp32_modules": "skip: no module has to stay in float32",
    "test_load_contiguous_weights": "test_save_and_load",
    "test_load_save_without_tied_weights": "test_untied_weights_are_saved_both",
    "test_load_with_mismatched_shapes": "test_mismatched_shapes_are_refused_or_drawn_afresh",
    "test_loading_in_another_dtype": "test_it_loads_in_another_dtype",
    "test_mismatched_shapes_have_properly_initialized_weights": "test_mismatched_shapes_are_refused_or_drawn_afresh",
    "test_model_get_set_embeddings": "test_embeddings_can_be_replaced",
    "test_model_is_small": "skip: about the size of models in their tests",
    "test_model_main_input_name": "test_forward_begins_with_input_ids",
    "test_model_outputs_equivalence": "test_tuples_hold_what_dictionaries_hold",
    "test_model_weights_reload_no_missing_tied_weights": "test_tied_weights_are_saved_once_and_not_missed",
    "test_multi_gpu_data_parallel_forward": "skip: needs several GPUs",
    "test_num_layers_is_small": "skip: about the size of models in their tests",
    "test_problem_types": "test_problem_types",
    "test_resize_embeddings_results_in_successful_loss": "test_the_vocabulary_can_be_resized",
    "test_resize_embeddings_untied": "test_the_vocabulary_can_be_resized",
    "test_resize_position_vector_embeddings": "skip: positions are computed, no table holds them",
    "test_resize_tokens_embeddings": "test_the_vocabulary_can_be_resized",
    "test_retain_grad_hidden_states_attentions": "test_gradients_reach_every_hidden_state",
    "test_save_load": "test_save_and_load",
    "test_save_load_keys_to_ignore_on_save": "test_tied_weights_are_saved_once_and_not_missed",
    "test_sharded_checkpoints": "test_shards",
    "test_tie_model_weights": "test_tied_weights_are_saved_once_and_not_missed",
    "test_tied_weights_keys": "test_tied_weights_are_saved_once_and_not_missed",
    "test_torch_compile_for_training": "test_compiled_in_one_graph_it_trains_alike",
    "test_torch_export": "test_export",
    "test_torch_save_load": "test_a_state_dict_loads_without_a_folder",
    "test_training": "test_training_reaches_every_parameter",
    "test_training_gradient_checkpointing": "test_gradient_checkpointing_changes_no_gradient",
    "test_training_gradient_checkpointing_use_reentrant_false": "test_gradient_checkpointing_changes_no_gradient",
    "test_training_gradient_checkpointing_use_reentrant_true": "test_gradient_checkpointing_changes_no_gradient",
    "test_cpu_offload, test_disk_offload_*, test_model_parallelism": "skip: need a GPU to offload from",
    "test_flash_attn_*, test_sdpa_*, test_flex_attention_*": "skip: attention is LongNet's own",
    "test_tp_plan_*, test_reverse_loading_mapping, test_generation_tester_mixin_inheritance": "skip: about their source tree",
}  # fmt: skip


def test_the_table_names_tests_that_exist() -> None:
    named = {answer for answer in CHECKS.values() if not answer.startswith("skip: ")}
    assert all(callable(globals().get(name) or getattr(test_generic_saving, name, None)) for name in named)


@pytest.mark.parametrize("name", MODELS)
def test_determinism(name: str) -> None:
    model, ids = make(name), tokens()
    assert torch.equal(first(model, input_ids=ids), first(model, input_ids=ids))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    model, ids = make(name).double(), tokens(3, 40)
    rows = torch.cat([first(model, input_ids=row[None]) for row in ids])
    torch.testing.assert_close(first(model, input_ids=ids), rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_a_parameter_or_a_buffer(name: str) -> None:
    model = make(name)
    first(model, input_ids=tokens())
    for place, module in model.named_modules():
        held = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert held == [], place


@pytest.mark.parametrize("name", MODELS)
def test_forward_begins_with_input_ids(name: str) -> None:
    model = make(name)
    assert list(inspect.signature(model.forward).parameters)[:2] == ["input_ids", "attention_mask"]
    assert model.main_input_name == "input_ids"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states(name: str, by_config: bool) -> None:
    model, ids = make(name), tokens()
    if by_config:
        model.config.output_hidden_states = True
    with torch.no_grad():
        given = model(ids) if by_config else model(ids, output_hidden_states=True)
        last = model.base_model(ids).last_hidden_state
    assert [x.shape for x in given.hidden_states] == [(3, 21, 32)] * 3
    torch.testing.assert_close(given.hidden_states[-1], last)
    embedded = model.get_input_embeddings()(ids) * 32**0.5
    torch.testing.assert_close(given.hidden_states[0], embedded)


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_are_refused(name: str) -> None:
    model, ids = make(name), tokens()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_hidden_state(name: str) -> None:
    given = make(name)(tokens(), output_hidden_states=True)
    for x in given.hidden_states:
        x.retain_grad()
    (given[0] ** 2).mean().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in given.hidden_states[:-1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"output_hidden_states": True}])
def test_tuples_hold_what_dictionaries_hold(name: str, more: dict[str, Any]) -> None:
    model, ids = make(name), tokens()
    given = {"labels": labels(name, ids)} if name in HEADS else {}
    with torch.no_grad():
        as_dictionary = model(ids, **given, **more).to_tuple()
        as_tuple = model(ids, **given, **more, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dictionary)
    torch.testing.assert_close(as_tuple, as_dictionary)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_in_place_of_tokens(name: str) -> None:
    model, ids = make(name), tokens(1)
    rows = model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(first(model, inputs_embeds=rows), first(model, input_ids=ids))
    for given in ({}, {"input_ids": ids, "inputs_embeds": rows}):
        with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
            model(**given)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", ["scores", "short", "floats"])
def test_masks_that_cannot_be_honoured_are_refused(name: str, mask: str) -> None:
    masks = {
        "scores": torch.zeros(3, 1, 21, 21),
        "short": torch.ones(3, 20, dtype=torch.int64),
        "floats": torch.zeros(3, 21).masked_fill(torch.rand(3, 21) > 0.5, -1e9),
    }
    with pytest.raises((ValueError, TypeError), match="attention_mask"):
        make(name)(tokens(), attention_mask=masks[mask])


@pytest.mark.parametrize("name", HEADS)
def test_training_reaches_every_parameter(name: str) -> None:
    model, ids = make(name).train(), tokens(4)
    model(ids, labels=labels(name, ids)).loss.backward()
    without = [place for place, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def switch_on(model: Any, options: dict[str, bool] | None = None) -> None:
    # The name that transformers 5.17 knows is deprecated in later ones.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(options)


def gradients(model: Any, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    ids = tokens(4)
    model(ids, labels=labels(name, ids)).loss.backward()
    return {place: p.grad.clone() for place, p in model.named_parameters()}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool | None) -> None:
    model = make(name).train()
    expected = gradients(model, name)
    switch_on(model, None if reentrant is None else {"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, name), expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_can_be_switched(name: str) -> None:
    model = make(name)
    assert model.supports_gradient_checkpointing
    stack = next(module for module in model.modules() if type(module).__name__.startswith("LongNetBase"))
    switch_on(model)
    assert stack.gradient_checkpointing
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    assert not stack.gradient_checkpointing


def test_the_loss_takes_the_trainers_count() -> None:
    model, ids = make(), tokens()
    mean = model(ids, labels=ids).loss
    share = model(ids, labels=ids, num_items_in_batch=torch.tensor(2 * 3 * 20)).loss
    torch.testing.assert_close(share, mean / 2)


def test_feed_forward_chunks_change_nothing() -> None:
    whole, chunked = make(), make(feed_forward_chunk=5)
    chunked.load_state_dict(whole.state_dict())
    torch.testing.assert_close(first(chunked, input_ids=tokens()), first(whole, input_ids=tokens()))


def test_logits_to_keep() -> None:
    model, ids = make(), tokens()
    every = first(model, input_ids=ids)
    torch.testing.assert_close(first(model, input_ids=ids, logits_to_keep=2), every[:, -2:])
    some = torch.tensor([0, 5, 20])
    torch.testing.assert_close(first(model, input_ids=ids, logits_to_keep=some), every[:, some])


@pytest.mark.parametrize("kind", ["regression", "single_label_classification", "multi_label_classification"])
def test_problem_types(kind: str) -> None:
    number = 1 if kind == "regression" else 3
    model, ids = make("LongNetForSequenceClassification", num_labels=number, problem_type=kind), tokens(4)
    wanted = {
        "regression": torch.randn(4),
        "single_label_classification": torch.tensor([0, 1, 2, 1]),
        "multi_label_classification": torch.randint(0, 2, (4, 3)).float(),
    }[kind]
    given = model(ids, labels=wanted)
    losses = {
        "regression": lambda: torch.nn.functional.mse_loss(given.logits.squeeze(), wanted),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(given.logits, wanted),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            given.logits, wanted
        ),
    }
    torch.testing.assert_close(given.loss, losses[kind]())
    given.loss.backward()


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_can_be_replaced(name: str) -> None:
    model = make(name)
    table = torch.nn.Embedding(VOCABULARY, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    head = model.get_output_embeddings()
    assert (head is None) == (name not in ("LongNetForCausalLM", "LongNetForMaskedLM"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [VOCABULARY + 6, VOCABULARY - 15])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_be_resized(name: str, size: int, tied: bool) -> None:
    model = make(name, tie_word_embeddings=tied)
    ids = tokens().clamp(max=VOCABULARY - 16)
    before = first(model, input_ids=ids)
    model.resize_token_embeddings(size)
    after = first(model, input_ids=ids)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    if before.shape[-1] == VOCABULARY:
        kept = min(size, VOCABULARY)
        assert after.shape[-1] == size
        before, after = before[..., :kept], after[..., :kept]
    torch.testing.assert_close(after, before)
    largest = torch.full((2, 9), size - 1)
    with torch.no_grad():
        assert model(largest)[0].isfinite().all()
    with pytest.raises(ValueError, match=f"expected 0 to {size - 1}"):
        model(largest + 1)
    if name in HEADS:
        model(largest, labels=labels(name, largest)).loss.backward()


def test_compiled_in_one_graph_it_trains_alike() -> None:
    model = make().train()
    expected = gradients(model, "LongNetForCausalLM")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradients(compiled, "LongNetForCausalLM"), {f"_orig_mod.{k}": v for k, v in expected.items()}
    )


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str) -> None:
    model, ids = make(name), tokens()
    program = torch.export.export(model, (ids,), strict=False)
    torch.testing.assert_close(program.module()(ids)[0], first(model, input_ids=ids))


def test_an_exported_graph_takes_no_documents() -> None:
    ids = tokens(1, 12)
    given = {"input_ids": ids, "position_ids": torch.arange(6).repeat(2)[None]}
    with pytest.raises(ValueError, match="position_ids in an exported graph: where documents begin decides"):
        torch.export.export(make(), (), given, strict=False)


@pytest.mark.parametrize("other", ["sdpa", "flash_attention_2", "flex_attention", "longnet_dilated"])
def test_no_other_attention_can_be_asked_for(other: str, tmp_path: Path) -> None:
    refused = f"attn_implementation='{other}': expected 'eager' or None, a LongNet's attention is its own"
    with pytest.raises(ValueError, match=refused):
        type(make())._from_config(config(), attn_implementation=other)
    model, ids = make(), tokens()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refused):
        type(model).from_pretrained(tmp_path, attn_implementation=other)
    with pytest.raises(ValueError, match=refused):
        model.set_attn_implementation(other)
    # transformers' word for what a model's own file computes.
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    again.set_attn_implementation("eager")
    assert torch.equal(first(again, input_ids=ids), first(model, input_ids=ids))
