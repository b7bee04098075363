"""Which full layers of a trained model stay full: the choice, its losses, what stays as it is, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longnet.models import LongNetConfig, LongNetLM
from longnet.training.choose import choose_layers, pair_share, windowed_config
from longnet.training.data import cut_windows, draw_starts
from longnet.training.models import Model, make_model, open_transformer
from longnet.training.transformer import TransformerLM

N, W = 48, 6
STREAM = (np.arange(900) * 37 % 251 + np.arange(900) ** 2 % 5).astype(np.uint8)
DENSE = LongNetConfig(
    dim=16, heads=2, layers=3, segment_lengths=(), dilation_rates=(), layer_types=("full_attention",), sliding_window=W
)


def llama(folder: Any, **changes: Any) -> Any:
    """The config of a small Llama in a folder, or of another decoder."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.3,
    }  # fmt: skip
    kind = changes.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return open_transformer(folder)


@pytest.fixture(params=["longnet", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Any) -> Model:
    """A dense model of three layers with random weights."""
    config = DENSE if request.param == "longnet" else windowed_config(llama(tmp_path), N, W)
    torch.manual_seed(0)
    return make_model(config)


def out_projections(model: Model) -> list[torch.nn.Linear]:
    if isinstance(model, TransformerLM):
        return [block.self_attn.o_proj for block in model.blocks]
    return [block.attention.out_proj for block in model.blocks]


def choices(model: Model, **options: Any) -> list[Any]:
    return list(choose_layers(model, STREAM, N, **{"window": W, "texts": 3, **options}))


@pytest.mark.parametrize("important", [0, 1, 2])
def test_the_layer_whose_attention_matters_stays_full(model: Model, important: int) -> None:
    with torch.no_grad():
        for layer, projection in enumerate(out_projections(model)):
            if layer != important:
                for parameter in projection.parameters():
                    parameter.zero_().requires_grad_(False)
    # So that a window there costs something.
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    windows = cut_windows(STREAM, N, draw_starts(STREAM, N, 3, 0, 1))
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(*windows).backward()
        optimizer.step()
    rows = choices(model)
    assert [len(row.full_layers) for row in rows] == [3, 2, 1]
    assert rows[-1].full_layers == (important,)
    assert rows[-1].loss == pytest.approx(rows[0].loss, abs=1e-6)
    types = ["full_attention"] * 3
    types[important] = "sliding_attention"
    assert slow_loss(model, tuple(types)) > rows[0].loss + 1e-3


def slow_loss(model: Model, types: tuple[str, ...]) -> float:
    """From whole logits of a new model with these layers, of the windows of the first step of a run with seed 0."""
    fresh = make_model(model.config.replace(layer_types=types, sliding_window=W))
    fresh.load_state_dict(model.state_dict())
    tokens, targets = cut_windows(STREAM, N, draw_starts(STREAM, N, 3, 0, 1))
    with torch.no_grad():
        logits = fresh.eval().logits(tokens) if isinstance(fresh, TransformerLM) else fresh.eval()(tokens)
    return float(F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("batch", [1, 2])
def test_losses_are_those_of_models_made_anew_in_evaluation(model: Model, batch: int) -> None:
    model.train()
    rows = choices(model, batch=batch)
    expected = [slow_loss(model, row.layer_types) for row in rows]
    assert [row.loss for row in rows] == pytest.approx(expected, abs=2e-6)
    assert len({round(loss, 5) for loss in expected}) == 3
    for before, row in pairwise(rows):
        # No other layer would have cost less.
        others = (
            tuple("sliding_attention" if at == layer else name for at, name in enumerate(before.layer_types))
            for layer in before.full_layers
        )
        assert row.loss == pytest.approx(min(slow_loss(model, types) for types in others), abs=2e-6)
        assert {*before.full_layers} - {*row.full_layers} == {row.layer}


def test_the_model_is_as_it_was_between_results(model: Model) -> None:
    tokens = torch.arange(N)[None]
    config, weights = model.config, {name: x.clone() for name, x in model.state_dict().items()}
    expected = model.loss(tokens, tokens)
    for row in choose_layers(model, STREAM, N, window=W, texts=1):
        assert row.layer is None or len(row.full_layers) < 3
        assert model.training and model.config is config
        assert torch.equal(model.loss(tokens, tokens), expected)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_progress_counts_every_loss() -> None:
    seen: list[tuple[float, int]] = []
    model = LongNetLM(DENSE.replace(layers=4, layer_types=DENSE.layer_types[:1]))
    rows = choices(model, full=2, texts=2, on_progress=lambda done, total: seen.append((done, total)))
    assert [len(row.full_layers) for row in rows] == [4, 3, 2]
    assert seen == [(half / 2, 1 + 4 + 3) for half in range(1, 17)]


def test_layers_of_other_types_stay() -> None:
    types = ("sliding_attention", "full_attention", "dilated_attention", "full_attention")
    config = DENSE.replace(layers=4, layer_types=types, segment_lengths=(8,), dilation_rates=(1,))
    rows = choices(LongNetLM(config), window=None)
    assert len(rows) == 2
    assert [rows[-1].layer_types[at] for at in (0, 2)] == ["sliding_attention", "dilated_attention"]


def test_a_transformer_keeps_its_own_windows(tmp_path: Any) -> None:
    config = llama(
        tmp_path, kind="Qwen2", use_sliding_window=True, sliding_window=W, max_window_layers=2, num_key_value_heads=1
    )
    assert config.layer_types is None
    windowed = windowed_config(config, N)
    assert windowed.layer_types == ("full_attention", "full_attention", "sliding_attention")
    assert windowed.sliding_window == W and windowed.segment_lengths == ()
    assert [row.layer_types[2] for row in choices(make_model(windowed))] == ["sliding_attention"] * 2
    with pytest.raises(ValueError, match=f"window=9 for a model whose .* layers read {W} tokens: expected window={W}"):
        windowed_config(config, N, 9)


def test_the_share_of_pairs_is_that_of_a_count() -> None:
    config = DENSE.replace(layer_types=("full_attention", "sliding_attention", "sliding_attention"))
    dense, windows = N * (N + 1) // 2, sum(min(query + 1, W) for query in range(N))
    assert pair_share(config, N) == pytest.approx((dense + 2 * windows) / (3 * dense))
    rows = choices(LongNetLM(DENSE))
    assert rows[0].pair_share == 1.0 and rows[-1].pair_share == pytest.approx(pair_share(config, N))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"layer_types": None, "segment_lengths": (8,), "dilation_rates": (1,)}, {}, "all of LongNet's dilated attention"),
        ({"layer_types": ("sliding_attention",)}, {}, "all of sliding_attention: expected a model with full attention"),
        ({}, {"full": 3}, "full=3 with 3 full layers in the model: expected from 1 to 2"),
        ({}, {"full": 0}, "full=0: expected at least 1"),
        ({"layers": 1, "layer_types": ("full_attention",)}, {}, "full=1 with 1 full .*: expected a model with at least 2"),
        ({}, {"window": N}, f"window={N} with context={N}: expected a window shorter than the context"),
        ({}, {"window": None}, r"window=512 \(the default\) with context=48"),
        ({"causal": False}, {}, "config.causal=False: a language model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        windowed_config(DENSE.replace(**changes), N, **{"window": W, **options})


@pytest.mark.parametrize(
    ("options", "words"), [({"texts": 0}, "texts=0"), ({"batch": 0}, "batch=0"), ({"window": 0}, "window=0: expected")]
)
def test_numbers_below_1_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choices(LongNetLM(DENSE), **options)


def test_a_stream_of_another_kind_is_refused() -> None:
    for stream in (torch.zeros(500, dtype=torch.long), bytes(500)):
        with pytest.raises(TypeError, match="stream has type .*: expected Corpus.train, or a numpy array"):
            next(choose_layers(LongNetLM(DENSE), stream, N, window=W))  # type: ignore[arg-type]


def test_layers_that_rotate_by_their_type_are_refused_before_any_loss(tmp_path: Any) -> None:
    types = ["full_attention", "full_attention", "sliding_attention"]
    config = llama(tmp_path, kind="Gemma3Text", layer_types=types, sliding_window=W, head_dim=8, num_key_value_heads=1)
    with pytest.raises(ValueError, match="rotates queries and keys by a layer's own type"):
        windowed_config(config, N)


def test_a_model_of_nan_is_refused(model: Model) -> None:
    with torch.no_grad():
        out_projections(model)[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss of the model itself is nan: expected a finite number"):
        choices(model)


def test_a_refused_attention_leaves_a_transformer_as_it_was(tmp_path: Any) -> None:
    config = windowed_config(llama(tmp_path), N, W).replace(layer_types=("sliding_attention",))
    model = make_model(config)
    assert isinstance(model, TransformerLM)
    tokens = torch.arange(N)[None]
    expected = model.logits(tokens)
    with pytest.raises(ValueError, match="without segment_lengths"):
        model.attend_as(config.replace(layer_types=("dilated_attention",)))
    assert model.config is config and torch.equal(model.logits(tokens), expected)
