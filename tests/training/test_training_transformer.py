"""A run that begins with a transformer of Hugging Face: what it computes, what is said, refused, resumed and handed back."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import longnet.hf  # noqa: E402
from longnet.cli.generate import generate  # noqa: E402
from longnet.cli.model_config import read_config  # noqa: E402
from longnet.training import TrainSettings, TransformerConfig, load_model, read_transformer, train, write_report  # noqa: E402
from longnet.training.checkpoint import read_checkpoint  # noqa: E402
from longnet.training.data import cut_windows, draw_starts, pack_windows, read_corpus  # noqa: E402
from longnet.training.folder import load_trained  # noqa: E402
from longnet.training.metrics import read_metrics  # noqa: E402
from longnet.training.optimizer import make_optimizer  # noqa: E402
from longnet.training.progress import SilentReporter  # noqa: E402
from longnet.training.transformer import TransformerLM  # noqa: E402

Make = Callable[..., TrainSettings]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **TOKENS),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **TOKENS
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **TOKENS, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **TOKENS, head_dim=8),
}
PATTERN = {"segment_lengths": (16, 32), "dilation_rates": (1, 2)}


class Lines(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of every kind with random weights, saved; nothing writes into them."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def make(make_settings: Make, folders: dict[str, Path]) -> Make:
    """Settings of a run that begins with one of these models, on bytes; ``pattern`` goes to ``read_transformer``."""

    def settings(name: str = "llama", pattern: dict[str, Any] = PATTERN, **changes: Any) -> TrainSettings:
        context = changes.pop("context", 32)
        model = read_transformer(folders[name], context, tokenizer_size=256, **pattern)
        return make_settings(model=model, init_from=str(folders[name]), context=context, **changes)

    return settings


def _train(settings: TrainSettings, **options: Any) -> list[tuple[Any, ...]]:
    """Kind, step and loss of all lines of the run."""
    train(settings, **options)
    lines = read_metrics(Path(settings.out) / "metrics.jsonl")
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def _slow_loss(model: Any, settings: TrainSettings) -> float:
    """Of the first step in float64, from whole logits, one document after the other."""
    data = read_corpus(settings.data, lambda _: None)
    starts = draw_starts(data.train, settings.context, settings.batch, settings.seed, 1)
    tokens, targets = cut_windows(data.train, settings.context, starts)
    bounds = list(range(0, tokens.numel() + 1, settings.context))
    if settings.pack is not None:
        tokens, targets, bounds = pack_windows(tokens, targets, data.documents, starts)
    tokens, targets = tokens.flatten(), targets.flatten()
    losses = []
    model = model.double().eval()
    for first, last in pairwise(bounds):
        logits = model(input_ids=tokens[first:last][None], use_cache=False).logits[0]
        chosen = logits.log_softmax(-1)[torch.arange(last - first), targets[first:last].clamp(min=0)]
        losses += [
            -one for one, target in zip(chosen.tolist(), targets[first:last].tolist(), strict=True) if target >= 0
        ]
    return float(np.mean(losses))


def _without_dropout(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual dropout of GPT-2 is left out: losses of a step can be compared."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.usefixtures("without_dropout")
@pytest.mark.parametrize("pack", [None, "documents"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_loss_is_that_of_the_dilated_model(
    make: Make, folders: dict[str, Path], name: str, pack: str | None
) -> None:
    settings = make(name, steps=1, eval_every=0, pack=pack)
    found = _train(settings)[0][2]
    dilated = longnet.hf.apply(_without_dropout(folders[name]), **PATTERN)
    assert found == pytest.approx(_slow_loss(dilated, settings), rel=1e-5)
    if pack is None:
        dense = _slow_loss(longnet.hf.restore(dilated), settings)
        assert abs(found - dense) > 1e-3, "the pattern changes nothing"


@pytest.mark.usefixtures("without_dropout")
@pytest.mark.parametrize("name", CONFIGS)
def test_one_segment_over_the_context_at_rate_1_is_the_untouched_model(
    make: Make, folders: dict[str, Path], name: str
) -> None:
    settings = make(name, {}, steps=1, eval_every=0)
    assert (settings.model.segment_lengths, settings.model.dilation_rates) == ((32,), (1,)), (
        "the default at this length"
    )
    assert _train(settings)[0][2] == pytest.approx(_slow_loss(_without_dropout(folders[name]), settings), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(
    make: Make, tmp_path: Path, name: str, optimizer: str
) -> None:
    changes = {"optimizer": optimizer, "steps": 8, "save_every": 3, "accumulate": 2}
    whole = _train(make(name, out=str(tmp_path / "whole"), **changes))
    parts = make(name, out=str(tmp_path / "parts"), **changes)
    stops = iter([False] * 4 + [True])
    assert train(parts, should_stop=lambda: next(stops)).step == 4
    # As after kill -9 in the steps that follow: the checkpoint of step 4, and lines beyond it.
    with open(Path(parts.out) / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 1')
    assert _train(parts, resume=True) == whole
    first, last = whole[0][2], [line for line in whole if line[0] == "train"][-1][2]
    assert last < first, "it learns"


def test_tied_weights_are_saved_once_and_stay_tied(make: Make) -> None:
    settings = make("qwen2", steps=2, eval_every=0)
    train(settings)
    names = read_checkpoint(Path(settings.out) / "checkpoint" / "state.safetensors").tensors
    assert "model.model.model.embed_tokens.weight" in names and "model.model.lm_head.weight" not in names
    model = longnet.hf.from_run(settings.out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_muon_trains_the_matrices_of_the_blocks_alone(make: Make) -> None:
    for name, per_block in (("llama", 7), ("gpt2", 4)):
        settings = make(name, optimizer="muon")
        model = TransformerLM(settings.model)
        groups = make_optimizer(model, settings).param_groups
        matrices = [weight for group in groups if "ns_steps" in group for weight in group["params"]]
        in_blocks = {id(weight) for weight in model.blocks.parameters()}
        assert len(matrices) == 2 * per_block and all(id(weight) in in_blocks for weight in matrices)


def test_what_changes_is_said(make: Make) -> None:
    reporter = Lines()
    train(make("llama", {}, context=128, steps=1, eval_every=0), reporter=reporter)
    at = next(n for n, line in enumerate(reporter.lines) if line.startswith("Starting from the weights of"))
    assert reporter.lines[at + 1 : at + 6] == [
        "Tokenizer: bytes",
        "max_position_embeddings was 64, now 128",
        "tokenizer_size was None, now 256",
        "segment_lengths was (), now (64, 128)",
        "dilation_rates was (), now (1, 2)",
    ]
    other = Lines()
    train(make("gpt2", out=f"{make().out}-2", steps=1, eval_every=0), reporter=other)
    assert "attn_pdrop was 0.1, now 0.0" in other.lines


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a Llama."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("".join(f"line {n}: {n * n}\n" for n in range(900)))
    model = read_transformer(folders["llama"], 32, tokenizer_size=256, **PATTERN)
    settings = TrainSettings(
        out=str(root / "run"), data=str(root / "text.txt"), model=model, init_from=str(folders["llama"]), context=32,
        steps=30, batch=4, lr=1e-2, warmup=3, eval_every=0, device="cpu", threads=1,
    )  # fmt: skip
    train(settings)
    return root / "run"


def test_its_run_gives_the_transformer_and_its_folder_loads_dilated(trained: Path, tmp_path: Path) -> None:
    model = longnet.hf.from_run(trained)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    ids = torch.randint(256, (2, 50))
    expected = load_trained(trained).logits(ids)
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(longnet.hf.load(tmp_path / "saved")(ids).logits, expected)
    assert read_transformer(tmp_path / "saved", 32).segment_lengths == PATTERN["segment_lengths"]
    longnet.hf.restore(model).save_pretrained(tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not torch.allclose(plain(ids).logits, expected, atol=1e-3)
    assert torch.allclose(longnet.hf.apply(plain, **PATTERN)(ids).logits, expected, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"holds a LlamaForCausalLM of transformers: expected a LongNet, or longnet.hf.from_run"
    ):
        load_model(trained)


def test_generation_is_that_of_whole_passes_and_draws_tokens_of_the_tokenizer(trained: Path) -> None:
    model = load_trained(trained)
    prompt = torch.randint(256, (1, 40))
    found, expected = model.generate(prompt, 12, temperature=0), prompt
    for _ in range(12):
        logits = model.logits(expected)[:, -1]
        expected = torch.cat((expected, logits[:, :256].argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, expected)
    with torch.no_grad():
        model.model.lm_head.weight[256:] = 100 * model.model.lm_head.weight[found[0, 40]]
    assert (model.generate(prompt, 12, seed=0) < 256).all()


def test_its_report_and_a_run_from_its_run_at_four_times_the_context(trained: Path, make_settings: Make) -> None:
    report = write_report(trained)
    assert report.context == 32 and (trained / "pattern.png").is_file()
    assert "LlamaForCausalLM" in (trained / "report.html").read_text()
    model = load_trained(trained).config
    longer = longnet.training.models.fit_context(model.replace(segment_lengths=(16, 128)), 128)
    settings = make_settings(model=longer, init_from=str(trained), context=128, steps=1, eval_every=0)
    reporter = Lines()
    train(settings, reporter=reporter)
    assert "max_position_embeddings was 64, now 128" in reporter.lines
    assert "segment_lengths was (16, 32), now (16, 128)" in reporter.lines
    assert json.loads((Path(settings.out) / "config.json").read_text()) == longer.to_dict()


def test_models_that_change_logits_after_the_head_keep_their_own(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "initializer_range"}
    config = transformers.GraniteConfig(**sizes, **TOKENS, logits_scaling=4.0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = TransformerLM(read_transformer(tmp_path, 32, loss_chunk=7, **PATTERN))
    ids, targets = torch.randint(260, (2, 2, 30))
    expected = torch.nn.functional.cross_entropy(model.logits(ids).flatten(0, 1), targets.flatten())
    assert model.loss(ids, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def _saved(config: Any, model_class: str) -> Callable[[Path], None]:
    return lambda folder: getattr(transformers, model_class)(config).save_pretrained(folder)


_BERT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    ("spoil", "context", "message"),
    [
        (_saved(transformers.BertConfig(**_BERT), "BertForMaskedLM"), 32, "is an encoder .*'bert'.*: expected a decoder"),
        (
            _saved(transformers.T5Config(vocab_size=260, d_model=32, d_ff=32, num_layers=1, num_heads=2), "T5Model"),
            32,
            r"is an encoder-decoder \(model_type='t5'\)",
        ),
        (_quantised, 32, r"holds quantised weights \(gptq\)"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "of-its-own"}'), 32, "'of-its-own'.* code in the"),
    ],
)  # fmt: skip
def test_another_kind_of_model_is_refused(
    tmp_path: Path, folders: dict[str, Path], spoil: Callable[[Path], None], context: int, message: str
) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_transformer(tmp_path, context)


def test_positions_that_end_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"context=65 is longer than the 64 positions .*transformer.wpe\): expected at most 64"
    ):
        read_transformer(folders["gpt2"], 65)
    dynamic = transformers.LlamaConfig(**SIZES, **TOKENS, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    transformers.LlamaForCausalLM(dynamic).save_pretrained(tmp_path)
    assert read_transformer(tmp_path, 64).segment_lengths == (64,)
    with pytest.raises(ValueError, match="rope_type='dynamic', which depends on the length: expected at most 64"):
        read_transformer(tmp_path, 65)


@pytest.mark.parametrize("damage", ["truncated", "missing", "other"])
def test_damaged_shards_are_refused_and_leave_nothing(
    make: Make, folders: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    place = tmp_path / "shards"
    transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).save_pretrained(place, max_shard_size="20KB")
    files = sorted(place.glob("*.safetensors"))
    assert len(files) > 2
    settings = make().replace(init_from=str(place))
    if damage == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-8])
    elif damage == "missing":
        files[1].unlink()
    else:
        transformers.LlamaModel(CONFIGS["llama"]()).save_pretrained(place)
        (place / "model.safetensors.index.json").unlink(missing_ok=True)
    name = "lacks lm_head.weight" if damage == "other" else files[1].name
    with pytest.raises(ValueError, match=name):
        train(settings)
    assert not list(Path(settings.out).glob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cp": 2}, "cp=2 with a model of transformers .'llama'.: expected cp=1"),
        ({"compile": True}, "compile=True with a model of transformers .'llama'.: expected compile=False"),
    ],
)
def test_settings_that_it_does_not_take_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_config_that_does_not_fit_its_context_or_tokenizer_is_refused(make: Make, folders: dict[str, Path]) -> None:
    settings = make()
    with pytest.raises(ValueError, match=r"context=128: expected .*max_position_embeddings=64 becomes 128"):
        train(settings.replace(context=128))
    with pytest.raises(ValueError, match="vocab_size=260 in the model: expected .*tokenizer_size=256"):
        train(settings.replace(model=settings.model.replace(tokenizer_size=None)))
    with pytest.raises(ValueError, match="tokenizer_size=300, and the 'llama' model has an embedding of 260 rows"):
        read_transformer(folders["llama"], 32, tokenizer_size=300)
    with pytest.raises(ValueError, match="'colour' is no field of TransformerConfig: expected one of"):
        read_transformer(folders["llama"], 32, colour=1)
    assert not Path(settings.out).exists()


def test_a_missing_folder_and_a_bad_context_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context=0: expected at least 1"):
        read_transformer(folders["llama"], 0)
    with pytest.raises(ValueError, match="folder='.*nope' is no folder: expected a folder that save_pretrained"):
        read_transformer(tmp_path / "nope", 64)
    with pytest.raises(ValueError, match="holds no config.json: expected a folder that save_pretrained"):
        read_transformer(tmp_path, 64)


def test_a_hugging_face_folder_is_no_run(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"llama' holds no run: its model is of Hugging Face \(model_type='llama'\)"
    ) as told:
        load_trained(folders["llama"])
    assert len(str(told.value)) < 300
    with pytest.raises(ValueError, match="--model .*config.json is of Hugging Face"):
        read_config("--model", folders["llama"])


def test_generation_beyond_a_table_of_positions_names_the_tokens(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make("gpt2", steps=1, eval_every=0)
    train(settings)
    model = load_trained(settings.out)
    with pytest.raises(
        ValueError, match="max_new_tokens=90 after a prompt of 4 tokens: context=94 is longer than the 64"
    ):
        model.generate(torch.zeros(1, 4, dtype=torch.long), 90)
    with pytest.raises(TypeError, match="streamer=5 has type int: expected a function"):
        model.generate(torch.zeros(1, 4, dtype=torch.long), 2, streamer=5)
    with pytest.raises(ValueError, match="^--tokens=90 after a prompt of 4 tokens"):
        generate(Path(settings.out), prompt="abcd", tokens=90, device="cpu")
    assert capsys.readouterr().out == ""


def test_the_tokenizer_of_prepared_data_is_said(make: Make, text_folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(file) for file in text_folder.rglob("*.txt")], vocab_size=260, show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    corpus = read_corpus(text_folder, tokenizer=str(tmp_path / "tokenizer.json"), folder=tmp_path / "prepared")
    assert corpus.tokenizer.vocab_size == 260
    settings, said = make(data=str(tmp_path / "prepared"), steps=1, eval_every=0), Lines()
    train(settings.replace(model=settings.model.replace(tokenizer_size=260)), reporter=said)
    assert "Tokenizer: that of the prepared data, 260 tokens" in said.lines


def test_layers_of_each_type_are_counted(make: Make) -> None:
    """Types are repeated up to the last layer."""
    settings, said = make(steps=1, eval_every=0), Lines()
    train(
        settings.replace(
            model=settings.model.replace(layer_types=("full_attention",), segment_lengths=(), dilation_rates=())
        ),
        reporter=said,
    )
    assert any(line.endswith("; 2 full_attention") for line in said.lines), said.lines


def test_windows_of_the_model_stay_by_default(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        **SIZES,
        **TOKENS,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    found = read_transformer(tmp_path, 128)
    assert found.layer_types == ("dilated_attention", "sliding_attention") and found.segment_lengths == (64, 128)
    assert [layer.pattern.window for layer in found.layer_attentions()] == [None, 8]
    assert TransformerConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert TransformerLM(found).loss(*torch.randint(256, (2, 1, 128))).isfinite()


def test_recomputed_layers_have_the_same_gradients(folders: dict[str, Path]) -> None:
    grads = []
    tokens, targets = torch.randint(256, (2, 2, 32))
    for recomputes in (False, True):
        config = read_transformer(folders["llama"], 32, gradient_checkpointing=recomputes, **PATTERN)
        torch.manual_seed(0)
        model = TransformerLM(config).train()
        model.loss(tokens, targets).backward()
        grads.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
