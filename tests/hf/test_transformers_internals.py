"""Internals of transformers: versions that were tried, and errors that name what has gone."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from apply_models import bert, inputs, llama
from torch import nn

from longnet.hf import apply, restore
from longnet.hf import transformers_internals as internals
from longnet.runtime.versions import Tried

GONE = rf"an internal of transformers that transformers {transformers.__version__} does not have: .*{{}}.*Expected transformers"


def test_the_installed_version_was_tried() -> None:
    assert internals.TRIED.unknown() is None


@pytest.mark.parametrize(
    "name",
    [
        "transformers.cache_utils.CacheLayerMixin",
        "transformers.cache_utils.DynamicLayer",
        "transformers.generation.configuration_utils.GenerationMode",
        "transformers.loss.loss_utils.ForSequenceClassificationLoss",
        "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
        "transformers.masking_utils.packed_sequence_mask_function",
        "transformers.modeling_outputs.CausalLMOutputWithPast",
        "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
        "transformers.utils.generic.can_return_tuple",
    ],
)
def test_an_import_that_has_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(name)
    with pytest.raises(RuntimeError, match=GONE.format(f"cannot import name '{name.split('.')[-1]}'")):
        runpy.run_path(internals.__file__)


def test_outputs_without_a_cache_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__", {"logits": None})
    with pytest.raises(RuntimeError, match=GONE.format("CausalLMOutputWithPast with a field cache or past_key_values")):
        runpy.run_path(internals.__file__)


# A private name of transformers, and what uses it.
NAMES: dict[str, Callable[[], Any]] = {
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": lambda: internals.name_classes(
        "longnet", causal_lm="LongNetForCausalLM"
    ),
    "transformers.PreTrainedModel._initialize_weights": lambda: internals.overrides(transformers.PreTrainedModel)(
        _named("_initialize_weights")
    ),
    "transformers.GenerationMixin._prepare_cache_for_generation": lambda: apply(llama().eval(), 8, 1).generate(
        inputs("llama")["input_ids"], max_new_tokens=1
    ),
}


def _named(name: str) -> Callable[..., Any]:
    def method() -> None: ...

    method.__name__ = name
    return method


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_has_gone_is_named_when_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(name)
    with pytest.raises(RuntimeError, match=GONE.format(name.split(".")[-1])):
        NAMES[name]()


def test_a_model_file_without_its_eager_attention_is_told() -> None:
    x = torch.ones(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match=GONE.format("test_transformers_internals.*eager_attention_forward")):
        internals.attend_by("eager", NoTransformer(), x, x, x, None, True, False)


def test_a_config_without_an_implementation_is_told() -> None:
    with pytest.raises(RuntimeError, match=GONE.format("_attn_implementation")):
        internals.implementation_of(SimpleNamespace())  # type: ignore[arg-type]


def test_a_model_is_refused_with_the_versions_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention layers are not recognised, transformers may have changed how they ask for their function."""
    monkeypatch.setattr(Tried, "installed", "6.1.0")
    with pytest.raises(ValueError, match=r"does not use .*\(transformers 6\.1\.0 is installed and longnet was tried"):
        internals.check_model(NoTransformer(), [])
    monkeypatch.setattr(Tried, "installed", "5.17.0")
    with pytest.raises(ValueError, match=r"expected a model that does$"):
        internals.check_model(NoTransformer(), [])


class NoTransformer(nn.Linear):
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self) -> None:
        super().__init__(2, 2)


def test_apply_and_restore_with_an_untried_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that was not tried is no reason to refuse."""
    monkeypatch.setattr(Tried, "installed", "6.1.0")
    model, given = bert().eval(), inputs("bert")
    with torch.no_grad():
        expected = model(**given).logits
        apply(model, 8, 1)(**given)
        assert torch.equal(restore(model)(**given).logits, expected)
