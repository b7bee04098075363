"""Dilation of Hugging Face models: saved, loaded, undone, and refused with the model left as it was."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from apply_models import MODELS, bert, gpt2, inputs, llama, logits, make, mistral
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from longnet.hf import apply, load, restore

SEGMENTS, RATES = (8, 24), (1, 3)
SEQ_TO_SEQ: dict[str, Any] = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    "vocab_size": 40,
    "d_model": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    modules = [(type(module), sorted(module.__dict__)) for module in model.modules()]
    implementations = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    return model.config.to_dict(), sorted(model.config.__dict__), modules, implementations


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_restore_undoes_all_of_it(name: str, original: str) -> None:
    model, given = make(name), inputs(name)
    model.set_attn_implementation(original)
    before, expected = state(model), logits(model, given)
    assert apply(model, SEGMENTS, RATES, layers=[0, 1]) is model
    assert not torch.equal(logits(model, given), expected)
    assert restore(model) is model
    assert state(model) == before
    assert torch.equal(logits(model, given), expected)
    with pytest.raises(ValueError, match="is not dilated"):
        restore(model)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_dilated_or_not_at_all(name: str, layers: Any, tmp_path: Path) -> None:
    model, given = apply(make(name), SEGMENTS, RATES, layers=layers, head_offsets="blocked"), inputs(name)
    expected = logits(model, given)
    # What saving sets in a config, it sets in any.
    model.save_pretrained(tmp_path / "first")
    before = state(model)
    model.save_pretrained(tmp_path)
    assert state(model) == before
    # Not even a class that asks for no model type reads it, and the error says what does.
    for read in (type(model).from_pretrained, AutoConfig.from_pretrained, type(model.config).from_pretrained):
        with pytest.raises(Exception, match=r"load this folder with longnet\.hf\.load"):
            read(tmp_path)
    # ``Trainer`` reads it as this when it resumes.
    PretrainedConfig.from_json_file(tmp_path / "config.json")
    again = load(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again, given), expected)
    # And once more: what was loaded is saved alike.
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    its, own = state(restore(again))[0], state(restore(model))[0]
    assert its | {"_name_or_path": ""} == own


def test_load_takes_a_class_and_options(tmp_path: Path) -> None:
    apply(make("qwen3"), SEGMENTS, RATES).save_pretrained(tmp_path)
    loaded = load(tmp_path, AutoModelForCausalLM, dtype=torch.float64)
    assert isinstance(loaded, transformers.Qwen3ForCausalLM) and loaded.dtype == torch.float64
    assert loaded.config.layer_types == ["full_attention"] * 3


def test_load_refuses_other_folders(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no 'longnet' entry"):
        load(tmp_path)


def clip_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config: Any = clip().config
    config.num_labels = 2
    return transformers.CLIPForImageClassification(config).eval()


class Wrapper(PreTrainedModel):
    """A model of somebody's whose config does not hold that of its part."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = make("llama")
        self.post_init()


@pytest.mark.parametrize(
    ("whole", "part", "given"),
    [
        (lambda: make("llama"), "model", inputs("llama")),
        (lambda: make("vit"), "vit", inputs("vit")),
        (clip_classifier, "vision_model", {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)}),
    ],
    ids=["llama", "vit", "clip"],
)
def test_a_model_around_a_dilated_part_is_saved_dilated(whole: Any, part: str, given: Any, tmp_path: Path) -> None:
    model = whole()
    dense = logits(model, given)
    apply(model.get_submodule(part), 2, 2)
    expected = logits(model, given)
    assert (expected - dense).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    for read in (type(model).from_pretrained, AutoConfig.from_pretrained, type(model.config).from_pretrained):
        with pytest.raises(Exception, match=r"load this folder with longnet\.hf\.load"):
            read(tmp_path)
    again = load(tmp_path).eval()
    assert type(again) is type(model) and torch.equal(logits(again, given), expected)
    restore(model.get_submodule(part))
    assert torch.equal(logits(model, given), dense)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), given), dense)


def test_a_model_whose_config_cannot_be_marked_is_not_saved(tmp_path: Path) -> None:
    outer = Wrapper(transformers.PretrainedConfig())
    apply(outer.inner, SEGMENTS, RATES)
    with pytest.raises(ValueError, match="Wrapper saves a config without that of its dilated part LlamaForCausalLM"):
        outer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    outer.state_dict()
    restore(outer.inner)
    outer.save_pretrained(tmp_path)


def test_a_config_alone_is_marked(tmp_path: Path) -> None:
    model = apply(make("llama"), SEGMENTS, RATES)
    model.config.save_pretrained(tmp_path)
    copy.deepcopy(model.config).save_pretrained(tmp_path / "copy")
    for folder in (tmp_path, tmp_path / "copy"):
        with pytest.raises(Exception, match=r"load this folder with longnet\.hf\.load"):
            AutoConfig.from_pretrained(folder)
    assert copy.deepcopy(model.config) == model.config


def test_another_attention_implementation_is_refused() -> None:
    model, given = make("llama"), inputs("llama")
    dense = logits(model, given)
    apply(model.model, SEGMENTS, RATES)
    expected = logits(model, given)
    with pytest.raises(ValueError, match="attn_implementation='sdpa' in a dilated model would make it dense"):
        model.model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, given), expected)
    # The model around knows nothing of it.
    model.set_attn_implementation("eager")
    if model.model.config._attn_implementation == "eager":
        with pytest.raises(ValueError, match="attn_implementation='eager' was set in a dilated model"):
            logits(model, given)
    else:
        # transformers 5.17 leaves a part with a config of its own, of the same class, alone.
        assert torch.equal(logits(model, given), expected)
    restore(model.model)
    assert torch.equal(logits(model, given), dense)
    model.set_attn_implementation("eager")


PICKLED = """
import sys, torch
assert "longnet" not in sys.modules
folder = sys.argv[1]
model, given, expected = torch.load(folder + "/model.pt", weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**given).logits, expected)
model.save_pretrained(folder + "/saved")
out = model.generate(**given, max_new_tokens=3, return_dict_in_generate=True)
print(type(list(out.values())[-1]).__name__)
"""


def test_a_pickled_model_is_dilated_in_another_process(tmp_path: Path, forked_hf: tuple[list[str], Path]) -> None:
    model, given = apply(make("llama"), SEGMENTS, RATES), inputs("llama")
    expected = logits(model, given)
    torch.save((model, given, expected), tmp_path / "model.pt")
    (tmp_path / "program.py").write_text(PICKLED)
    command = [*forked_hf[0], str(tmp_path / "program.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "BoundedCache"
    with pytest.raises(Exception, match=r"load this folder with longnet\.hf\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved").eval(), given), expected)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        again.lm_head.weight.mul_(2)
    restore(again)
    assert torch.equal(logits(model, given), expected)


def test_a_restored_model_saves_as_before(tmp_path: Path) -> None:
    model = restore(apply(make("llama"), SEGMENTS, RATES))
    model.save_pretrained(tmp_path)
    assert "longnet" not in json.loads((tmp_path / "config.json").read_text())
    given = inputs("llama")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), given), logits(model, given))


def test_a_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model, given = apply(make("llama"), SEGMENTS, RATES), inputs("llama")
    expected = logits(model, given)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path).eval(), given), logits(other, given))
    restore(other)
    assert torch.equal(logits(model, given), expected)


def test_another_model_of_the_same_config_does_not_attend_otherwise_unnoticed() -> None:
    model = make("llama")
    apply(model, SEGMENTS, RATES)
    other = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="without a pattern"):
        logits(other, inputs("llama"))


def test_another_model_of_the_same_config_attends_as_before(tmp_path: Path) -> None:
    config, given = make("llama").config, inputs("llama")
    model, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    expected = logits(other, given)
    apply(model, SEGMENTS, RATES)
    assert torch.equal(logits(other, given), expected)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(type(other).from_pretrained(tmp_path).eval(), given), expected)
    later = transformers.LlamaForCausalLM(config)
    later.load_state_dict(other.state_dict())
    assert torch.equal(logits(later.eval(), given), expected)
    # Both may be dilated, each by its own pattern.
    apply(other, 16, 2)
    assert other.config.longnet["dilation_rates"] == [2] and model.config.longnet["dilation_rates"] == [1, 3]
    assert torch.equal(logits(restore(other), given), expected)


def test_restore_keeps_what_was_changed_in_the_config(tmp_path: Path) -> None:
    model = apply(make("llama"), SEGMENTS, RATES)
    model.resize_token_embeddings(64)
    model.config.use_cache = False
    restore(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.vocab_size == 64 and again.config.use_cache is False


ENCODERS = {
    "bart": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(**SEQ_TO_SEQ, max_position_embeddings=64)
        ),
        {"input_ids": torch.arange(100).reshape(2, 50) % 37 + 3},
    ),
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**SEQ_TO_SEQ, num_mel_bins=8, max_source_positions=50, max_target_positions=20)
        ),
        {"input_features": torch.linspace(-1, 1, 1600).sin().reshape(2, 8, 100)},
    ),
}


def encoder_decoder(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    whole, given = ENCODERS[name]
    model = whole().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model, given


def uses(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a whole encoder-decoder computes in each way of using it."""
    text = torch.arange(14).reshape(2, 7) + 3
    with torch.no_grad():
        encoded = BaseModelOutput(model.model.encoder(**given).last_hidden_state)
        return {
            "encoder": encoded.last_hidden_state,
            "forward": model(**given, decoder_input_ids=text).logits,
            "no cache": model(**given, decoder_input_ids=text, use_cache=False).logits,
            "labels": model(**given, labels=text).loss,
            "encoder_outputs": model(encoder_outputs=encoded, decoder_input_ids=text).logits,
            "generate": model.generate(**given, max_new_tokens=5, do_sample=False),
        }


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_dilated_and_its_decoder_is_not(name: str, tmp_path: Path) -> None:
    model, given = encoder_decoder(name)
    dense = uses(model, given)
    encoder = model.get_submodule("model.encoder")
    apply(encoder, 64, 1)
    torch.testing.assert_close(uses(model, given), dense, rtol=1e-4, atol=1e-4)
    restore(encoder)
    torch.testing.assert_close(uses(model, given), dense, rtol=0, atol=0)
    apply(encoder, SEGMENTS, RATES)
    expected = uses(model, given)
    assert (expected["encoder"] - dense["encoder"]).abs().max() > 1e-3
    assert (expected["forward"] - dense["forward"]).abs().max() > 1e-3
    # The decoder is the dense model's, on what the encoder gives.
    other, _ = encoder_decoder(name)
    with torch.no_grad():
        on_top = other(
            encoder_outputs=BaseModelOutput(expected["encoder"]), decoder_input_ids=torch.arange(14).reshape(2, 7) + 3
        ).logits
    torch.testing.assert_close(expected["forward"], on_top)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(uses(again, given), expected, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"load this folder with longnet\.hf\.load"):
        type(model).from_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "copy"):
        torch.testing.assert_close(uses(load(folder).eval(), given), expected, rtol=0, atol=0)
    restore(encoder)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(uses(type(model).from_pretrained(tmp_path).eval(), given), dense, rtol=0, atol=0)


class Pair(PreTrainedModel):
    """Two models of one config in one."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.one, self.two = transformers.LlamaModel(config), transformers.LlamaModel(config)
        self.post_init()


def test_two_dilated_parts_of_one_config_are_not_saved_together(tmp_path: Path) -> None:
    pair = Pair(make("llama").config)
    apply(pair.one, SEGMENTS, RATES)
    apply(pair.two, 16, 2)
    with pytest.raises(ValueError, match="Pair has 2 dilated parts of one config"):
        pair.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def t5() -> PreTrainedModel:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def bart() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    return transformers.BartModel(transformers.BartConfig(vocab_size=40, d_model=16, **sizes))


def clip() -> PreTrainedModel:
    part: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**part, "vocab_size": 40}, vision_config={**part, "image_size": 8, "patch_size": 4}
        )
    )


def gemma2() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "head_dim": 8,
    }
    config = transformers.Gemma2Config(
        vocab_size=40, num_key_value_heads=1, layer_types=["full_attention"] * 2, pad_token_id=0, **sizes
    )
    return transformers.Gemma2Model(config)


def gpt_oss() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "head_dim": 8,
    }
    config = transformers.GptOssConfig(
        **sizes, vocab_size=40, num_key_value_heads=1, num_local_experts=2, layer_types=["full_attention"],
        num_experts_per_tok=1, pad_token_id=0, sliding_window=None,
    )  # fmt: skip
    return transformers.GptOssModel(config)


def mamba() -> PreTrainedModel:
    return transformers.MambaModel(
        transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def swin() -> PreTrainedModel:
    config = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    return transformers.SwinModel(config)


def segformer() -> PreTrainedModel:
    return transformers.SegformerModel(transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 10, 10, 16]))


def splinter() -> PreTrainedModel:
    """An encoder whose layers do not say that they look ahead."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.SplinterModel(transformers.SplinterConfig(vocab_size=40, intermediate_size=16, **sizes))


def doge() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.DogeModel(transformers.DogeConfig(vocab_size=40, intermediate_size=16, **sizes))


ONE = {"segment_lengths": 8, "dilation_rates": 1}


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (mamba, ONE, ValueError, "MambaModel does not use transformers' AttentionInterface"),
        (t5, ONE, ValueError, "T5ForConditionalGeneration (does not use|has cross-attention)"),
        (bart, ONE, ValueError, "BartModel has cross-attention"),
        (lambda: gpt2(add_cross_attention=True), ONE, ValueError, "has cross-attention"),
        (clip, ONE, ValueError, "CLIPModel has attention layers of several configs"),
        (lambda: mistral(sliding_window=16), ONE, ValueError, "has a sliding window of 16 tokens"),
        (gemma2, ONE, ValueError, "soft-caps its scores"),
        (gpt_oss, ONE, ValueError, "has attention sinks"),
        (swin, ONE, ValueError, "SwinModel has"),
        (segformer, ONE, ValueError, r"num_attention_heads=.*: expected one number, the same in all layers"),
        (doge, ONE, ValueError, "DogeModel has a mask of its own"),
        (splinter, ONE, ValueError, "SplinterModel does not use transformers' AttentionInterface"),
        (lambda: bart().decoder, ONE, ValueError, "BartDecoder has cross-attention"),
        (llama, {**ONE, "layers": [0, 3]}, ValueError, r"layers=\[0, 3\]: expected at least one of the layers 0 to 2"),
        (llama, {**ONE, "layers": []}, ValueError, r"layers=\[\]"),
        (llama, {**ONE, "layers": [-1]}, ValueError, r"layers=\[-1\]"),
        (llama, {**ONE, "layers": [1, 1]}, ValueError, "each once"),
        (llama, {**ONE, "layers": [1.0]}, TypeError, "holds 1.0 of type float"),
        (llama, {**ONE, "layers": 1}, TypeError, "layers=1 has type int"),
        (llama, {**ONE, "backend": "fast"}, ValueError, "backend='fast' is unknown"),
        (llama, {**ONE, "head_offsets": "mixed"}, ValueError, "head_offsets='mixed'"),
        (
            lambda: llama(attn_implementation="longnet_dilated"),
            ONE,
            ValueError,
            "attn_implementation='longnet_dilated' was set before longnet.hf.apply: expected the implementation",
        ),
        (llama, {"segment_lengths": (8, 16), "dilation_rates": 1}, ValueError, "differ in length"),
        (llama, {"segment_lengths": 4, "dilation_rates": 8}, ValueError, "more than its segment length"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    make_model: Any, options: Any, error: type[Exception], message: str
) -> None:
    model = make_model()
    before = state(model)
    with pytest.raises(error, match=message):
        apply(model, **options)
    assert state(model) == before


def test_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model has type Linear"):
        apply(torch.nn.Linear(2, 2), 8, 1)  # type: ignore[type-var]
    model = apply(make("llama"), 8, 1)
    before = state(model)
    with pytest.raises(ValueError, match="is dilated already"):
        apply(model, 8, 1)
    assert state(model) == before


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (llama, {"attention_mask": torch.ones(2, 1, 50, 50, dtype=torch.bool)}, "a mask of scores"),
        (llama, {"attention_mask": torch.zeros(2, 1, 50, 50)}, "a mask of scores"),
        (llama, {"output_attentions": True}, "attention weights are never made"),
        (gpt2, {"output_attentions": True}, "attention weights are never made"),
        (llama, {"global_attention_mask": torch.ones(2, 50)}, "asks for global_attention_mask, global tokens"),
        (llama, {"head_mask": torch.ones(3, 4)}, "asks for head_mask, heads left out"),
        (llama, {"encoder_hidden_states": torch.ones(2, 3, 32)}, "asks for encoder_hidden_states, cross-attention"),
        (llama, {"softcap": 3.0}, "asks for softcap, soft-capped scores"),
        (
            llama,
            {"cu_seq_lens_q": torch.tensor([0, 20, 100])},
            r"cu_seq_lens_q=\[0, 20, 100\]: expected .* 2 rows of 50",
        ),
        (llama, {"cu_seq_lens_k": torch.tensor([0, 50, 100])}, "cu_seq_lens_k without cu_seq_lens_q"),
        (llama, {"seq_idx": torch.zeros(1, 50)}, r"seq_idx has shape \(1, 50\)"),
    ],
)
def test_calls_that_cannot_be_honoured_are_refused(make_model: Any, options: dict[str, Any], message: str) -> None:
    model, given = apply(make_model().eval(), SEGMENTS, RATES), inputs("llama")
    before, expected = state(model), logits(model, given)
    with pytest.raises(ValueError, match=message):
        logits(model, given, **options)
    assert state(model) == before
    assert torch.equal(logits(model, given), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cu_seqlen", "cu_seq_lens_q"),
        ("cu_seqlens", "cu_seq_lens_q"),
        ("cu_seq_len_k", "cu_seq_lens_k"),
        ("seq_ids", "seq_idx"),
        ("attention_masks", "attention_mask"),
        ("position_id", "position_ids"),
    ],
)
@pytest.mark.parametrize("make_model", [llama, gpt2, bert])
def test_a_misspelt_keyword_is_refused(make_model: Any, name: str, expected: str) -> None:
    """transformers ignores keywords that it does not know."""
    model, given = apply(make_model().eval(), SEGMENTS, RATES), inputs("llama")
    with pytest.raises(ValueError, match=f"{name} is no keyword of .*: expected {expected}"):
        logits(model, given, **{name: torch.tensor([0, 20, 100])})
    others = {"num_items_in_batch": 3, "image_attention_mask": torch.ones(1), "of_mine": 1, name: None}
    assert torch.equal(logits(model, given, **others), logits(model, given))


@pytest.mark.parametrize("model", [lambda: llama(attention_dropout=0.1), lambda: gpt2(attn_pdrop=0.1)])
def test_attention_dropout_in_training_is_refused(model: Any) -> None:
    dilated, given = apply(model(), SEGMENTS, RATES).train(), inputs("llama")
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1 in training"):
        dilated(**given)
    logits(dilated.eval(), given)


def test_a_pattern_that_leaves_positions_out_says_so() -> None:
    with pytest.warns(UserWarning, match="to no head"):
        apply(make("llama"), 32, 8)
