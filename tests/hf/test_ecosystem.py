"""LongNets of longnet.hf in the hands of other libraries: pipelines, Trainer, PEFT, TRL, lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from longnet_models import QUICK, first, make, tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modelcard import TrainingSummary

from longnet.hf import LongNetByteTokenizer, LongNetForCausalLM, LongNetForMaskedLM

# PEFT, TRL and these tests use the name that transformers 5.17 knows and later ones deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning")

TEXTS = [
    "the first of a few short texts",
    "a second one, somewhat longer than the first",
    "three",
    "and the fourth is here",
]
BYTES: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


def model_of_bytes(**changes: Any) -> Any:
    return make(**{**BYTES, **changes})


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of ids for Trainer."""

    def __init__(self, texts: Sequence[str] = TEXTS * 4) -> None:
        tokenizer = LongNetByteTokenizer()
        self.rows = [tokenizer(text) for text in texts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        **QUICK,
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        **options,
    }
    collator = DataCollatorForLanguageModeling(LongNetByteTokenizer(), mlm=False)
    return Trainer(
        model, TrainingArguments(**given), data_collator=collator, train_dataset=Rows(), eval_dataset=Rows(TEXTS)
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_text_generation_pipeline() -> None:
    model, tokenizer = model_of_bytes().double(), LongNetByteTokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = "some prompt that goes over a segment"
    options = {"max_new_tokens": 7, "do_sample": False, "return_full_text": False, "eos_token_id": None}
    [given] = write(prompt, **options)
    ids = torch.tensor([list(prompt.encode())])
    expected = model.to_longnet().generate(ids, 7, temperature=0)[0, len(prompt) :]
    assert given["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    several = write([prompt, "short"], batch_size=2, **options)
    assert len(several) == 2 and several[0][0] == given


def test_classification_pipeline() -> None:
    model = make("LongNetForSequenceClassification", **BYTES)
    classify = pipeline("text-classification", model=model, tokenizer=LongNetByteTokenizer(), device="cpu")
    [given] = classify(TEXTS[0])
    expected = first(model, input_ids=torch.tensor([list(TEXTS[0].encode())])).softmax(-1)
    assert given["label"] == f"LABEL_{expected.argmax()}" and given["score"] == pytest.approx(
        expected.max().item(), abs=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["plain", "gradient checkpointing", "bf16", "torch_compile"],
)
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    # A compiler takes twice as long for two layers.
    layers = 1 if "torch_compile" in options else 2
    plain = trainer(model_of_bytes(num_hidden_layers=layers), tmp_path)
    plain.train()
    run = trainer(model_of_bytes(num_hidden_layers=layers), tmp_path, **options)
    run.train()
    assert len(losses(run)) == 4 and losses(run)[-1] < losses(run)[0]
    assert losses(run) == pytest.approx(losses(plain), rel=2e-2 if "bf16" in options else 1e-4)
    # Rows are padded on the left here; the predictions hold no cache.
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=2e-2)


def test_trainer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = trainer(model_of_bytes(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(model_of_bytes(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(first(saved, input_ids=tokens()), first(whole.model.eval(), input_ids=tokens()))


def smoothed(logits: Tensor, labels: Tensor, epsilon: float = 0.1) -> float:
    """Label smoothing by its definition, over targets (B, N) of which -100 are none."""
    logs, real = logits.double().log_softmax(-1), labels != -100
    nll = -logs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (((1 - epsilon) * nll - epsilon * logs.mean(-1)) * real).sum().item() / int(real.sum())


class OwnDecoder(LongNetForCausalLM):
    """A class whose name no table of transformers holds."""


class OwnEncoder(LongNetForMaskedLM):
    """One more."""


@pytest.mark.parametrize("kind", ["plain", "subclass", "lora"])
def test_smoothed_labels_are_those_of_the_next_token(kind: str, tmp_path: Path) -> None:
    model = model_of_bytes()
    if kind == "subclass":
        model = OwnDecoder(model.config)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    run = trainer(model.eval(), tmp_path, label_smoothing_factor=0.1)
    batch = run.data_collator([Rows()[0], Rows()[1]])
    logits = first(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = smoothed(logits[:, :-1], batch["labels"][:, 1:])
    assert run.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-5)
    assert run.evaluate(Rows(TEXTS[:2]))["eval_loss"] == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LongNetForCausalLM", "text-generation"),
        ("LongNetForMaskedLM", "fill-mask"),
        ("LongNetForSequenceClassification", "text-classification"),
    ],
)
def test_trainers_model_card_names_the_task(name: str, task: str, tmp_path: Path) -> None:
    run = Trainer(make(name), TrainingArguments(str(tmp_path), **QUICK))
    assert run.label_names == ["labels"]
    assert TrainingSummary.from_trainer(run, finetuned_from="a model of mine").tasks == task


def test_smoothed_labels_of_an_encoder_are_not_shifted(tmp_path: Path) -> None:
    model, ids = make("LongNetForMaskedLM"), tokens(2, 12)
    run = Trainer(model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **QUICK))
    given = run.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert given.item() == pytest.approx(smoothed(first(model, input_ids=ids), ids), rel=1e-5)


@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForMaskedLM"])
def test_a_subclass_has_the_loss_of_its_class(name: str) -> None:
    model, ids = make(name), tokens(2, 12)
    own = (OwnDecoder if name == "LongNetForCausalLM" else OwnEncoder)(model.config).eval()
    own.load_state_dict(model.state_dict())
    assert own.loss_type == model.loss_type == name.removeprefix("LongNet")
    assert torch.equal(own(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["LongNetForCausalLM", "LongNetForMaskedLM"])
def test_accumulated_gradients_are_those_of_one_batch(name: str, tmp_path: Path) -> None:
    """Rows of unlike lengths: every token counts once."""
    tokenizer = LongNetByteTokenizer(mask_token="<mask>")
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in (tokenizer(text) for text in TEXTS)]

    def trained(size: int, accumulated: int) -> Tensor:
        options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, **QUICK}
        model = make(name, **BYTES, tie_word_embeddings=False)
        run = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
                **options,
            ),
            train_dataset=rows,  # type: ignore[arg-type]
            # On the right, where padding shifts no segment: a row then gives what it gives alone.
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )
        run.train()
        return model.lm_head.weight.detach()

    tokenizer.padding_side = "right"
    whole, parts = trained(4, 1), trained(1, 4)
    assert (whole - make(name, **BYTES, tie_word_embeddings=False).lm_head.weight).abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_flattened_batches_are_packed_documents() -> None:
    """transformers' collator without padding tells documents apart by position ids."""
    model, rows = model_of_bytes().double(), [Rows()[0], Rows()[1]]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row["input_ids"]} for row in rows])
    given = first(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    alone = [first(model, input_ids=torch.tensor([row["input_ids"]])) for row in rows]
    torch.testing.assert_close(given, torch.cat(alone, 1))


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = model_of_bytes(), tokens(2, 40)
    before = first(model, input_ids=ids)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora" in name for name in trained)
    torch.testing.assert_close(first(adapted, input_ids=ids), before)
    run = trainer(adapted, tmp_path, gradient_checkpointing=True, learning_rate=1e-2)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    adapted.eval()
    after = first(adapted, input_ids=ids)
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model_of_bytes(), tmp_path / "adapter").eval()
    torch.testing.assert_close(first(again, input_ids=ids), after)
    assert again.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 43)
    merged = again.merge_and_unload()
    torch.testing.assert_close(first(merged, input_ids=ids), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(first(plain, input_ids=ids), first(merged, input_ids=ids))


@pytest.mark.parametrize(
    "use",
    [
        lambda model, ids: model(input_ids=ids),
        lambda model, ids: model.train()(input_ids=ids, labels=ids),
        lambda model, ids: model.generate(input_ids=ids, max_new_tokens=3),
        lambda model, ids: model.generate(input_ids=ids, max_new_tokens=3, use_cache=False),
    ],
    ids=["forward", "train", "generate", "generate without a cache"],
)
def test_prefix_tuning_is_refused(use: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(model_of_bytes(), config).eval()
    with pytest.raises(TypeError, match=r"keys made elsewhere \(PEFT's prefix tuning\) cannot precede the text"):
        use(model, tokens(2, 40))


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning(packing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    options: dict[str, Any] = {
        **QUICK,
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "max_length": 64,
        "packing": packing,
    }
    run = trl.SFTTrainer(
        model_of_bytes(),
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=LongNetByteTokenizer(),
    )
    run.train()
    assert len(losses(run)) == 3 and losses(run)[-1] < losses(run)[0]


def test_lm_eval(tmp_path: Path) -> None:
    hflm = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = model_of_bytes(), LongNetByteTokenizer()
    judge = hflm.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128, device="cpu")
    asked = [("the first of a", " few short texts"), ("a second", " one, longer than the first")]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(asked)]
    given = judge.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(asked, given, strict=True):
        ids = torch.tensor([list((context + continuation).encode())])
        chances = first(model, input_ids=ids).log_softmax(-1)[0, len(context) - 1 : -1]
        expected = chances.gather(1, ids[0, len(context) :, None]).sum()
        assert score == pytest.approx(expected.item(), rel=1e-4)
    [text] = judge.generate_until(
        [Instance("generate_until", {}, ("a prompt", {"until": ["\n"], "max_gen_toks": 5}), 0)], disable_tqdm=True
    )
    assert isinstance(text, str)


def test_a_folder_with_everything(tmp_path: Path) -> None:
    model_of_bytes().save_pretrained(tmp_path)
    LongNetByteTokenizer().save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), LongNetByteTokenizer)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert write("some", max_new_tokens=3)[0]["generated_text"].startswith("some")
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "longnet"
