"""Dilated models of Hugging Face compute what the definition says: forward, padding, documents, gradients."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from apply_models import DECODERS, MODELS, inputs, logits, make
from oracle import dense_attention
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from longnet.hf import BoundedCache, apply
from longnet.hf.transformers_internals import CACHE

# The name that both versions of transformers know.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

SEGMENTS, RATES = (8, 24), (1, 3)
# Models and the side on which the second row is padded; pictures have no padding.
CASES = [(name, side) for name in MODELS for side in (None, "left", "right") if name != "vit" or side is None]


def set_to_oracle(
    model: PreTrainedModel, layers: Iterator[int] | None = None, head_offsets: str = "interleaved"
) -> None:
    """Attend by the definition: dense, in float64. Layers that are not among ``layers`` attend fully."""
    dilated = None if layers is None else set(layers)
    order: dict[nn.Module, int] = {}

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        number = order.setdefault(module, len(order))
        length = q.shape[2]
        pattern = (SEGMENTS, RATES) if dilated is None or number in dilated else ((length,), (1,))
        out, _lse = dense_attention(
            *(q, k, v),
            *pattern,
            is_causal=bool(module.is_causal),
            scale=scaling,
            key_padding_mask=None if mask is None else ~mask,
            head_offsets=head_offsets,
            # The grid of a row of a decoder begins with its first token.
            segment_offset=-leading(mask) if module.is_causal and mask is not None else 0,
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("oracle_of_tests", attend)
    AttentionMaskInterface.register("oracle_of_tests", flash_attention_mask)
    model.set_attn_implementation("oracle_of_tests")


def leading(mask: Tensor) -> Tensor:
    """Tokens of padding at the beginning of each row of (B, N) bool, True where a token is."""
    return (~mask).long().cumprod(1).sum(1)


def padding(side: str | None, batch: int = 2, length: int = 50) -> Tensor:
    """(B, N), 1 where a token is; the second row has 13 tokens of padding."""
    real = torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        real[1, :13] = 0
    elif side == "right":
        real[1, -13:] = 0
    return real


@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_long_segment_of_rate_one_changes_nothing(name: str, side: str | None) -> None:
    model, given = make(name), inputs(name)
    if side is not None:
        given["attention_mask"] = padding(side)
    real = slice(None) if name == "vit" else padding(side).bool()
    expected = logits(model, given)[real]
    assert (logits(apply(model, 64, 1), given)[real] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "side", "layers", "head_offsets"),
    [
        *((*case, layers, "interleaved") for case in CASES for layers in (None, [0, 2])),
        ("llama", "left", None, "blocked"),
        ("bert", "right", [1], "blocked"),
    ],
)
def test_logits_are_those_of_the_definition(name: str, side: str | None, layers: Any, head_offsets: Any) -> None:
    given = {key: x if key == "input_ids" else x.double() for key, x in inputs(name).items()}
    if side is not None:
        given["attention_mask"] = padding(side)
    oracle = make(name).double()
    set_to_oracle(oracle, layers, head_offsets)
    expected = logits(oracle, given)
    dilated = apply(make(name).double(), SEGMENTS, RATES, layers=layers, head_offsets=head_offsets)
    real = slice(None) if name == "vit" else padding(side).bool()
    assert (logits(dilated, given)[real] - expected[real]).abs().max() < 1e-9
    # And that is another function than before.
    assert (logits(make(name).double(), given)[real] - expected[real]).abs().max() > 1e-3


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_are_as_if_alone(name: str, layers: Any, original: str) -> None:
    model = make(name).double()
    model.set_attn_implementation(original)
    apply(model, SEGMENTS, RATES, layers=layers)
    ids, lengths = inputs(name)["input_ids"], [[7, 1, 42], [50]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    expected = torch.stack(
        [
            torch.cat([logits(model, {"input_ids": part[None]})[0] for part in row.split(its)])
            for row, its in zip(ids, lengths, strict=True)
        ]
    )
    for options in ({"use_cache": False}, {}, {"attention_mask": torch.ones_like(ids)}):
        got = logits(model, {"input_ids": ids}, position_ids=positions, **options)
        # transformers' eager attention has its softmax in float32.
        assert (got - expected).abs().max() < (1e-5 if original == "eager" and layers else 1e-9)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", DECODERS)
def test_boundaries_of_flash_attention_separate_documents(name: str, layers: Any) -> None:
    """``cu_seq_lens_q`` and ``seq_idx`` alone leave positions as they are: only attention is cut."""
    model, ids = apply(make(name).double(), SEGMENTS, RATES, layers=layers), inputs(name)["input_ids"]
    positions = torch.arange(50)[None]
    parts = [(0, 0, 20), (0, 20, 50), (1, 0, 50)]
    expected = torch.cat(
        [
            logits(model, {"input_ids": ids[row : row + 1, start:end]}, position_ids=positions[:, start:end])[0]
            for row, start, end in parts
        ]
    )
    bounds = torch.tensor([0, 20, 50, 50, 100], dtype=torch.int32)
    numbers = torch.tensor([[0] * 20 + [1] * 30, [2] * 50], dtype=torch.int32)
    for given in (
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 50, "max_length_k": 50},
        {"seq_idx": numbers},
        {"seq_idx": numbers, "use_cache": False},
    ):
        got = logits(model, {"input_ids": ids}, position_ids=positions, **given)
        assert (got.flatten(0, 1) - expected).abs().max() < 1e-9


def test_boundaries_go_with_padding_and_positions() -> None:
    model, ids = apply(make("llama").double(), SEGMENTS, RATES), inputs("llama", batch=1)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in (20, 20, 10)])[None]
    expected = torch.cat([logits(model, {"input_ids": part}) for part in ids[:, :37].split((20, 17), 1)], 1)
    given = {"input_ids": ids, "attention_mask": padding("right")[1:]}
    bounds = torch.tensor([0, 20, 40, 50])
    assert (logits(model, given, position_ids=positions, cu_seq_lens_q=bounds)[:, :37] - expected).abs().max() < 1e-9


def deepseek() -> Any:
    sizes: dict[str, Any] = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "kv_lora_rank": 8, "q_lora_rank": 16}
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, v_head_dim=12, first_k_dense_replace=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).double().eval()


def test_values_narrower_than_queries() -> None:
    model, given = deepseek(), inputs("llama")
    set_to_oracle(oracle := deepseek())
    expected = logits(oracle, given)
    apply(model, SEGMENTS, RATES)
    assert (logits(model, given, use_cache=False) - expected).abs().max() < 1e-9
    # It caches a latent, in a cache of its own kind.
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 50)}
    ids = given["input_ids"]
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
    with pytest.raises(ValueError, match="caches a latent in place of keys and values"):
        BoundedCache(model)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_an_exported_model_takes_padding(name: str, layers: Any) -> None:
    model, given = apply(make(name), SEGMENTS, RATES, layers=layers), inputs(name)
    model.config.use_cache = False
    if name != "vit":
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    program = torch.export.export(model, (), given, strict=False)
    torch.testing.assert_close(program.module()(**given)["logits"], logits(model, given), rtol=1e-4, atol=1e-4)
    if name == "vit":
        return
    # The graph was made without padding. Rows that begin with a period of it have the segments that they have alone.
    given["attention_mask"][0, :24] = 0
    given["attention_mask"][1, 40:] = 0
    real = given["attention_mask"] == 1
    exported = program.module()(**given)["logits"][real]
    torch.testing.assert_close(exported, logits(model, given)[real], rtol=1e-4, atol=1e-4)
    without = {"input_ids": given["input_ids"]}
    program = torch.export.export(model, (), without, strict=False)
    torch.testing.assert_close(program.module()(**without)["logits"], logits(model, without), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_place", [False, True])
def test_an_exported_model_takes_no_documents(by_place: bool) -> None:
    model, ids = apply(make("llama"), SEGMENTS, RATES), inputs("llama", 1)["input_ids"]
    positions = torch.arange(25).repeat(2)[None]
    given = ((ids, None, positions), {}) if by_place else ((ids,), {"position_ids": positions})
    with pytest.raises(ValueError, match="position_ids in an exported graph: where documents begin decides"):
        torch.export.export(model, *given, strict=False)


def whisper() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=16, num_mel_bins=8, max_source_positions=50, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.WhisperForAudioClassification(config).double().eval()


def test_an_encoder_of_a_model_with_a_decoder() -> None:
    given = {"input_features": torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(1)).double()}
    set_to_oracle(oracle := whisper())
    dense, expected = logits(whisper(), given), logits(oracle, given)
    assert (logits(apply(whisper(), SEGMENTS, RATES), given) - expected).abs().max() < 1e-9
    assert (dense - expected).abs().max() > 1e-6


def test_packed_documents_beside_padding() -> None:
    model = apply(make("llama").double(), SEGMENTS, RATES)
    ids = inputs("llama", batch=1)["input_ids"]
    positions = torch.cat([torch.arange(n) for n in (20, 20, 10)])[None]
    real = padding("right")[1:]
    expected = torch.cat([logits(model, {"input_ids": part}) for part in ids[:, :37].split((20, 17), 1)], 1)
    got = logits(model, {"input_ids": ids, "attention_mask": real}, position_ids=positions)
    assert (got[:, :37] - expected).abs().max() < 1e-9


def test_positions_that_start_at_padding_are_one_document() -> None:
    """``generate`` gives a left-padded row's first real token the position 0."""
    model = apply(make("llama").double(), SEGMENTS, RATES)
    real = padding("left")
    given = {**inputs("llama"), "attention_mask": real}
    positions = (real.cumsum(1) - 1).masked_fill(real == 0, 1)
    set_to_oracle(oracle := make("llama").double())
    got, expected = (logits(each, given, position_ids=positions) for each in (model, oracle))
    assert (got - expected)[real.bool()].abs().max() < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradients_are_those_of_the_definition(name: str, checkpointing: bool) -> None:
    given = {**inputs(name), "attention_mask": padding("right")}
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**given, labels=labels, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    set_to_oracle(oracle := make(name).double())
    expected = gradients(oracle)
    got = gradients(apply(make(name).double(), SEGMENTS, RATES))
    assert len(got) == len(expected) > 10
    for mine, its in zip(got, expected, strict=True):
        assert (mine - its).norm() <= 1e-9 * max(1.0, its.norm())


def test_a_step_of_training_on_packed_rows_learns() -> None:
    model = apply(make("llama"), SEGMENTS, RATES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = inputs("llama", batch=1)["input_ids"]
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


LONG = """
import resource, sys, torch, transformers
import longnet.hf
config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=50_000)
model = longnet.hf.apply(transformers.LlamaForCausalLM(config), (512, 2048), (1, 2)).eval()
ids = torch.randint(3, 40, (1, 50_000))
mask, positions = torch.ones_like(ids), torch.arange(50_000)[None]
mask[:, -500:] = 0
with torch.no_grad():
    model(input_ids=ids[:, :64], logits_to_keep=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for given in ({}, {"attention_mask": mask}, {"position_ids": positions % 20_000}):
        assert model(input_ids=ids, logits_to_keep=1, **given).logits.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_mask_of_all_pairs_is_ever_built(tmp_path: Path, forked_hf: tuple[list[str], Path]) -> None:
    """50,000 tokens: one bit a pair would be 298 MiB more, one byte 2.3 GiB."""
    (tmp_path / "program.py").write_text(LONG)
    done = subprocess.run(
        [*forked_hf[0], str(tmp_path / "program.py")], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 300


@pytest.mark.filterwarnings("error:a row is padded on the left")
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(name: str, use_cache: bool) -> None:
    model, ids = apply(make(name).double(), SEGMENTS, RATES), inputs(name)["input_ids"]
    mask = padding("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = {CACHE: BoundedCache(model)} if use_cache else {}
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    together = logits(model, given, use_cache=use_cache, **cache)
    alone = logits(model, {"input_ids": ids[1:, 13:]}, use_cache=False)
    assert (together[1, 13:] - alone[0]).abs().max() < 1e-9
    assert (together[0] - logits(model, {"input_ids": ids[:1]}, use_cache=False)[0]).abs().max() < 1e-9


def test_left_padding_of_an_encoder_counts_as_positions() -> None:
    model = apply(make("bert"), SEGMENTS, RATES)
    with pytest.warns(UserWarning, match="padded on the left"):
        logits(model, {**inputs("bert"), "attention_mask": padding("left")})
