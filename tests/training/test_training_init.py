"""A run that begins with existing weights: which files it takes, what may change, what is refused, how it is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet.compress import quantize
from longnet.models import LongNetConfig, LongNetLM
from longnet.training import CheckpointError, TrainSettings, load_model, save_model, train
from longnet.training.checkpoint import digest_tensors, model_weights, read_checkpoint, save_checkpoint
from longnet.training.folder import RunFolder
from longnet.training.initial import copy_weights, open_initial, read_initial
from longnet.training.metrics import read_metrics
from longnet.training.progress import SilentReporter
from longnet.training.resume import read_settings

Make = Callable[..., TrainSettings]
CONFIG = LongNetConfig(dim=16, heads=2, layers=2, segment_lengths=(8, 16), dilation_rates=(1, 2), dropout=0.1)
TOKENS = torch.arange(3, 83)[None]


class Lines(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def make(make_settings: Make) -> Make:
    """Settings of a run of the model of these tests."""
    return lambda **changes: make_settings(**{"model": CONFIG, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 30 steps; nothing writes into it."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("".join(f"line {n}: {n * n}\n" for n in range(900)))
    train(
        TrainSettings(
            out=str(root / "run"), data=str(root / "text.txt"), model=CONFIG, context=32, steps=30, batch=2, warmup=3,
            lr=1e-2, eval_every=0, device="cpu", threads=1,
        )
    )  # fmt: skip
    return root / "run"


@pytest.fixture(scope="module")
def sources(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every kind of place that a run can begin with."""
    import longnet.hf

    root, model = tmp_path_factory.mktemp("sources"), load_model(trained)
    save_model(model, root / "saved")
    adapted = longnet.hf.LongNetForCausalLM.from_longnet(model)
    adapted.save_pretrained(root / "hf")
    adapted.save_pretrained(root / "shards", max_shard_size="4KB")
    assert len(list((root / "shards").glob("*.safetensors"))) > 2
    folders = {name: root / name for name in ("saved", "hf", "shards")}
    return {"run": trained, "checkpoint": trained / "checkpoint" / "state.safetensors", **folders}


def _first_weights(settings: TrainSettings) -> LongNetLM:
    """The model of the checkpoint that a run saves before its first step."""
    train(settings, should_stop=lambda: True)
    checkpoint = read_checkpoint(Path(settings.out) / "checkpoint" / "state.safetensors")
    assert checkpoint.progress["step"] == 0
    assert not any(name.startswith("optimizer.") for name in checkpoint.tensors)
    return load_model(settings.out)


def _lines(settings: TrainSettings) -> list[tuple[Any, ...]]:
    lines = read_metrics(Path(settings.out) / "metrics.jsonl")
    return [(line["kind"], line["step"], line["loss"], line.get("lr")) for line in lines]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "saved", "hf", "shards"])
def test_every_kind_of_place_gives_the_same_function(
    make: Make, trained: Path, sources: dict[str, Path], kind: str
) -> None:
    reporter = Lines()
    settings = make(init_from=str(sources[kind]))
    train(settings, should_stop=lambda: True, reporter=reporter)
    model, old = load_model(settings.out), load_model(trained)
    assert torch.equal(model(TOKENS), old(TOKENS))
    assert not torch.equal(LongNetLM(CONFIG)(TOKENS), old(TOKENS))
    assert f"Starting from the weights of {sources[kind]}" in reporter.lines
    assert not any(" was " in line for line in reporter.lines)
    # All of them hold weights of one digest.
    saved = read_settings(RunFolder(settings.out))
    assert saved.init_from == str(sources[kind]) and saved.init_digest == digest_tensors(dict(old.state_dict()))


def test_it_starts_at_step_0_with_a_lower_loss_than_a_fresh_model(make: Make, trained: Path, tmp_path: Path) -> None:
    fresh, warm = make(out=str(tmp_path / "fresh")), make(out=str(tmp_path / "warm"), init_from=str(trained))
    assert train(warm).step == 12 == train(fresh).step
    one, other = _lines(fresh), _lines(warm)
    assert [line[:2] for line in one] == [line[:2] for line in other] and one[0][1] == 1
    assert [line[3] for line in one] == [line[3] for line in other], "another schedule"
    assert other[0][2] < one[0][2] - 0.5


def test_a_longer_context_and_another_pattern_take_the_same_weights_and_are_said(make: Make, trained: Path) -> None:
    changed = CONFIG.replace(
        segment_lengths=(8, 64),
        layer_types=("sliding_attention", "strided_attention"),
        sliding_window=9,
        shift_keys=True,
        far_positions=False,
        use_xpos=False,
        head_offsets="blocked",
        dropout=0.0,
    )
    reporter = Lines()
    settings = make(init_from=str(trained), model=changed, context=128)
    train(settings.replace(steps=2), reporter=reporter)
    at = reporter.lines.index(f"Starting from the weights of {trained}")
    assert sorted(reporter.lines[at + 1 : at + 9]) == [
        "dropout was 0.1, now 0.0",
        "far_positions was True, now False",
        "head_offsets was 'interleaved', now 'blocked'",
        "layer_types was None, now ('sliding_attention', 'strided_attention')",
        "segment_lengths was (8, 16), now (8, 64)",
        "shift_keys was False, now True",
        "sliding_window was 512, now 9",
        "use_xpos was True, now False",
    ]
    assert not any(" was " in line for line in reporter.lines[at + 9 :])
    _, weights = read_initial(settings, None, False, "bytes", print)
    model = LongNetLM(changed)
    copy_weights(weights, model)
    old = load_model(trained).state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
    assert json.loads((Path(settings.out) / "config.json").read_text()) == changed.to_dict()


def test_bfloat16_becomes_float32_and_the_other_way_round(make: Make, trained: Path, tmp_path: Path) -> None:
    half = make(out=str(tmp_path / "half"), init_from=str(trained), weights="bfloat16", dtype="bfloat16")
    rounded, old = _first_weights(half).state_dict(), load_model(trained).state_dict()
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in old.items())
    whole = make(out=str(tmp_path / "whole"), init_from=half.out)
    again = _first_weights(whole).state_dict()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in rounded.items())
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"dim": 32},
            (
                r"dim was 16, now 32; ffn_dim was 64, now 128; of its parameters 43 differ: "
                r"embedding.weight is \(256, 16\), expected \(256, 32\); ",
                r"; and 40 more\. Expected the same parameters",
            ),
        ),
        ({"heads": 4}, ("heads was 2, now 4; kv_heads was 2, now 4. Expected",)),
        ({"kv_heads": 1}, (r"kv_heads was 2, now 1; .*k_proj.weight is \(16, 16\), expected \(8, 16\)",)),
        (
            {"layers": 3},
            (r"layers was 2, now 3; of its parameters 20 differ: blocks.2.\S+ is missing, expected \(16,\)",),
        ),
        ({"layers": 1}, (r"layers was 2, now 1; .* 20 differ: blocks.1.\S+ is \(16,\), expected none",)),
        ({"norm": "rms"}, (r"norm was 'layer', now 'rms'; .* is \(16,\), expected none",)),
        ({"bias": False}, (r"bias was True, now False; .* expected none",)),
        ({"qk_norm": True}, (r"qk_norm was False, now True; .* is missing, expected \(8,\)",)),
        ({"use_rel_pos_bias": True}, (r"rel_pos_bias.weight is missing, expected \(32, 2\)",)),
        ({"tie_embeddings": False}, (r"1 differ: head.weight is missing, expected \(256, 16\)\. Expected",)),
        ({"ffn_dim": 8}, ("ffn_dim was 64, now 8; ",)),
        ({"head_numbers": ((0,), (0, 1))}, (r"head_numbers was None, now \(\(0,\), \(0, 1\)\); ",)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    make: Make, trained: Path, changes: dict[str, Any], messages: tuple[str, ...]
) -> None:
    settings = make(init_from=str(trained), model=CONFIG.replace(**changes))
    for message in messages:
        with pytest.raises(ValueError, match=f"init_from='{trained}' does not fit the model: .*{message}"):
            train(settings)
    assert not Path(settings.out).exists()


def _truncated(place: Path) -> Path:
    file = place / "model.safetensors" if place.is_dir() else place
    file.write_bytes(file.read_bytes()[:-8])
    return place


def _future(place: Path) -> Path:
    weights = load_file(place / "model.safetensors")
    save_file(weights, place / "model.safetensors", {"format": "longnet-model-99"})
    return place


def _foreign(place: Path) -> Path:
    config = place / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "llama"}))
    return place


def _without(name: str) -> Callable[[Path], Path]:
    def remove(place: Path) -> Path:
        (place / name).unlink()
        return place

    return remove


def _with_index(text: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / "model.safetensors.index.json").write_text(text)
        return place

    return write


def _quantised(place: Path) -> Path:
    model = load_model(place)
    shutil.rmtree(place)
    quantize(model, "int8wo")
    save_model(model, place)
    return place


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("run", lambda place: place / "gone", "gone' is not there: expected a run folder of longnet train, a folder of"),
        ("run", lambda place: place / "data", "data' holds no config.json: expected a run folder"),
        ("run", _without("model.safetensors"), "holds no model yet: expected model.safetensors"),
        ("run", _truncated, r"model\.safetensors is truncated or not a safetensors file"),
        ("saved", _future, "its format is 'longnet-model-99', expected 'longnet-model-2'"),
        ("saved", _quantised, r"holds quantised weights \(int8wo\): expected float32 or bfloat16"),
        ("checkpoint", _truncated, "source is truncated or not a safetensors file: "),
        (
            "run",
            lambda place: place / "model.safetensors",
            r"its format is 'longnet-model-2', .*\(init_from takes a folder, or a run's checkpoint/state.safetensors",
        ),
        ("hf", _foreign, "holds a model of kind 'llama', and the run trains a LongNetConfig: expected a TransformerConfig"),
        ("hf", _truncated, r"model\.safetensors is truncated or damaged"),
        ("hf", _without("model.safetensors"), r"model\.safetensors is not there: expected the safetensors that save_pre"),
        ("shards", _with_index("{}"), r"index\.json is truncated or damaged: 'weight_map'"),
        ("shards", _with_index("}"), r"index\.json is not JSON"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_read_is_refused_before_anything_is_written(
    make: Make,
    tmp_path: Path,
    sources: dict[str, Path],
    kind: str,
    damage: Callable[[Path], Path],
    message: str,
) -> None:
    source, place = sources[kind], tmp_path / "source"
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place)
    settings = make(init_from=str(damage(place)))
    with pytest.raises(ValueError, match=message):
        train(settings)
    assert not Path(settings.out).exists()


def test_a_place_inside_the_run_folder_is_refused(make: Make, trained: Path, tmp_path: Path) -> None:
    settings = make(out=str(tmp_path / "run"))
    shutil.copytree(trained, tmp_path / "run" / "old")
    with pytest.raises(ValueError, match=r"init_from='.*old' lies in out='.*run': expected another run folder"):
        train(settings.replace(init_from=str(tmp_path / "run" / "old")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["old"]
    with pytest.raises(ValueError, match="already holds a run: expected another folder, or --resume"):
        train(settings.replace(out=str(trained), init_from=str(trained)))


def test_a_foreign_vocabulary_is_refused(make: Make, tmp_path: Path) -> None:
    save_model(LongNetLM(CONFIG.replace(vocab_size=300)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocab_size was 300, now 256; .* 1 differ: embedding.weight is \(300, 16\)"):
        train(make(init_from=str(tmp_path / "other")))


def test_resumed_it_has_the_losses_of_a_run_that_was_not_stopped(make: Make, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    whole, parts = (make(out=str(tmp_path / name), init_from=str(source)) for name in ("whole", "parts"))
    train(whole)
    stops = iter([False] * 7 + [True])
    assert train(parts, should_stop=lambda: next(stops)).step == 7
    # It is never read again.
    shutil.rmtree(source)
    train(parts, resume=True)
    assert _lines(parts) == _lines(whole)
    one, other = load_model(whole.out).state_dict(), load_model(parts.out).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_before_its_first_checkpoint_it_reads_the_same_weights_again(
    make: Make, trained: Path, tmp_path: Path
) -> None:
    whole, killed = (make(out=str(tmp_path / name), init_from=str(trained)) for name in ("whole", "killed"))
    train(whole)
    train(killed, should_stop=lambda: True)
    (Path(killed.out) / "checkpoint" / "state.safetensors").unlink()
    train(killed, resume=True)
    assert _lines(killed) == _lines(whole)


def test_a_moved_folder_resumes_a_run_and_other_weights_do_not(make: Make, trained: Path, tmp_path: Path) -> None:
    settings = make(init_from=str(trained))
    stops = iter([False, False, True])
    train(settings, should_stop=lambda: next(stops))
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(trained, moved)
    save_model(LongNetLM(CONFIG), other)
    before = (Path(settings.out) / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"other' holds weights of digest \w{32}: expected \w{32}, those of the start"):
        train(settings.replace(init_from=str(other)), resume=True)
    with pytest.raises(ValueError, match=f"init_from was '{trained}', now None"):
        train(settings.replace(init_from=None), resume=True)
    with pytest.raises(ValueError, match=r"init_digest was '\w{32}', now 'abc'"):
        train(settings.replace(init_digest="abc"), resume=True)
    assert (Path(settings.out) / "run.json").read_bytes() == before
    assert train(settings.replace(init_from=str(moved), steps=12), resume=True).step == 12
    # The checkpoint, which names the old place, goes on belonging to this run.
    assert train(settings.replace(init_from=str(moved)), resume=True).step == 12


def test_a_run_that_began_with_random_weights_takes_no_others_later(make: Make, trained: Path) -> None:
    settings = make(steps=2)
    train(settings)
    with pytest.raises(ValueError, match=f"init_from was None, now '{trained}'"):
        train(settings.replace(init_from=str(trained)), resume=True)


def test_a_pattern_that_stays_short_is_said(make: Make, trained: Path) -> None:
    settings = make(init_from=str(trained))
    longest = max(settings.model.segment_lengths)
    for context, count in ((longest, 0), (2 * longest, 1)):
        lines: list[str] = []
        read_initial(settings.replace(context=context), None, False, "bytes", lines.append)
        assert sum("what lies beyond all segments is never read" in line for line in lines) == count, lines


def test_a_run_can_say_which_weights_it_expects(make: Make, trained: Path) -> None:
    with pytest.raises(ValueError, match="holds weights of digest .*: expected abc, those of the start"):
        train(make(init_from=str(trained), init_digest="abc"))
    with pytest.raises(ValueError, match="init_digest='abc' with init_from=None: expected both, or init_from alone"):
        make(init_digest="abc")
    with pytest.raises(TypeError, match="init_from=3 has type int: expected a path"):
        make(init_from=3)


def test_a_checkpoint_of_a_future_format_is_refused(make: Make, sources: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(sources["checkpoint"])
    assert model_weights(checkpoint.tensors)
    save_checkpoint(tmp_path / "state", checkpoint.tensors, checkpoint.progress)
    assert open_initial(str(tmp_path / "state"))[0] == CONFIG
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content.replace(b"longnet-training-state-2", b"longnet-training-state-7"))
    with pytest.raises(CheckpointError, match="its format is 'longnet-training-state-7', expected"):
        train(make(init_from=str(tmp_path / "state")))
