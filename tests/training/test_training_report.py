"""The report: numbers recomputed, pictures real, one file that stands alone."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from longnet.training import Evaluation, TrainSettings, load_model, read_corpus, train, write_report
from longnet.training.baselines import Baselines
from longnet.training.evaluate import CutContext, Estimate
from longnet.training.page import Page
from longnet.training.report import long_context_verdict

Make = Callable[..., TrainSettings]
PICTURES = ("loss", "positions", "pattern")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    from longnet.models import LongNetConfig

    root = tmp_path_factory.mktemp("report")
    (root / "text.txt").write_text("".join(f"the number {n} & its square <{n * n}>\n" for n in range(300)))
    model = LongNetConfig.preset("nano", layers=1)
    settings = TrainSettings(
        out=str(root / "run"), data=str(root / "text.txt"), model=model, context=64, steps=20, batch=2, eval_every=5,
        device="cpu", threads=1,
    )  # fmt: skip
    train(settings)
    return root, write_report(root / "run")


def test_the_held_out_bits_are_those_of_the_model_over_the_scored_bytes(run: tuple[Path, Evaluation]) -> None:
    root, evaluation = run
    held_out = read_corpus(root / "text.txt").held_out
    count = (held_out.size - 1) // 64
    assert (evaluation.windows, evaluation.scored_bytes, evaluation.context) == (count, count * 64, 64)
    rows = np.stack([held_out[64 * n : 64 * n + 65] for n in range(count)]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    with torch.no_grad():
        nats = load_model(root / "run").loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    assert evaluation.bits_per_byte.mean == pytest.approx(nats.item() / np.log(2), rel=1e-5)
    weights = [one.last - one.first + 1 for one in evaluation.positions]
    means = [one.bits_per_byte.mean for one in evaluation.positions]
    assert np.average(means, weights=weights) == pytest.approx(evaluation.bits_per_byte.mean, rel=1e-5)
    scored = held_out[1 : count * 64 + 1].tobytes()
    packed = len(lzma.compress(scored, preset=9 | lzma.PRESET_EXTREME))
    assert evaluation.baselines.lzma == pytest.approx(8 * packed / len(scored))


def test_pictures_are_pictures_and_the_page_embeds_them(run: tuple[Path, Evaluation]) -> None:
    folder = run[0] / "run"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == len(PICTURES)
    for name in PICTURES:
        pixels = imread(folder / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.02
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_the_page_of_a_model_without_all_heads_says_that_all_are_drawn(run: tuple[Path, Evaluation]) -> None:
    from longnet.models import LongNetConfig

    root = run[0]
    model = LongNetConfig.preset("nano", layers=1, head_numbers=((0, 2, 3),))
    settings = TrainSettings(
        out=str(root / "pruned"), data=str(root / "text.txt"), model=model, context=64, steps=1, batch=1, device="cpu", threads=1
    )  # fmt: skip
    train(settings)
    write_report(root / "pruned")
    said = "pruned from some layers"
    assert said in (root / "pruned" / "report.html").read_text(encoding="utf-8")
    assert said not in (root / "run" / "report.html").read_text(encoding="utf-8")


def test_the_page_holds_the_numbers_the_sentence_and_the_settings(run: tuple[Path, Evaluation]) -> None:
    folder, evaluation = run[0] / "run", run[1]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for value in (evaluation.bits_per_byte.mean, evaluation.baselines.lzma, evaluation.baselines.unigram):
        assert f"{value:.3f}" in page
    assert long_context_verdict(evaluation) in page
    assert "<th>weight decay</th><td>0.1</td>" in page
    assert "<th>segment lengths</th><td>[16, 32, 64]</td>" in page
    assert "its square &lt;" in page


def test_the_evaluation_is_there_for_programs_too(run: tuple[Path, Evaluation]) -> None:
    folder, evaluation = run[0] / "run", run[1]
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["bits_per_byte"]["mean"] == evaluation.bits_per_byte.mean
    assert [cut["last"] for cut in found["cuts"]] == [32]
    assert found["cuts"][0]["gain"]["low"] == evaluation.cuts[0].gain.low
    assert len(found["positions"]) == len(evaluation.positions)


def test_other_data_than_the_runs_are_refused(run: tuple[Path, Evaluation], tmp_path: Path) -> None:
    grown, out = tmp_path / "text.txt", run[0] / "run"
    content = (run[0] / "text.txt").read_bytes()
    for text, message in (
        (content + bytes(100), r"then, [\d,]+ training and .* now"),
        (content[::-1], "but other contents"),
    ):
        grown.write_bytes(text)
        with pytest.raises(
            ValueError, match=f"is not what the run in .* was trained on: .*{message}. The model stays in"
        ):
            write_report(out, corpus=read_corpus(grown))


def test_a_run_without_a_step_has_no_report(make_settings: Make) -> None:
    settings = make_settings()
    train(settings, should_stop=lambda: True)
    with pytest.raises(ValueError, match="has done no step yet"):
        write_report(settings.out)


@pytest.mark.filterwarnings("error")
def test_a_few_bytes_have_pictures_without_warnings(make_settings: Make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the text of ninety bytes " * 4)
    settings = make_settings(data=str(tmp_path / "short.txt"), steps=2)
    train(settings)
    evaluation = write_report(settings.out)
    assert evaluation.baselines.lzma > 20 and evaluation.baselines.compressed_bytes == evaluation.scored_bytes


def _evaluation(*lows: float | None, unigram: float = 4.0) -> Evaluation:
    """One with cuts to 16, 32, ... bytes whose gains are 0.01 above these lower ends."""
    cuts = []
    for number, low in enumerate(lows):
        last = 16 * 2**number
        gain = Estimate(0.0, None, None) if low is None else Estimate(low + 0.01, low, low + 0.02)
        cuts.append(CutContext(last // 2 + 1, last, 129, 256, 2.5 + gain.mean, 2.5, gain))
    return Evaluation(Estimate(2.5, None, None), 256, 3, 768, [], cuts, Baselines(unigram, unigram, 3.0, 768))


@pytest.mark.parametrize(
    ("lows", "expected"),
    [
        ((), "A context of 256 bytes is too short to tell"),
        ((None,), "Undecided, with one held-out window alone"),
        ((0.2, 0.1, 0.01), "Yes, the model uses its long context: the same bytes cost 2.520 bits a byte with 33 to 64 bytes"),
        ((0.2, 0.1, -0.01), "In part, the model uses up to about 64 bytes of its context: the same bytes cost 2.610"),
        ((-0.1, -0.1), "No, nothing is gained from more than 16 bytes of context"),
        ((0.0004, 0.0004), "No, nothing is gained from more than 16 bytes of context"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_intervals(lows: tuple[float | None, ...], expected: str) -> None:
    assert long_context_verdict(_evaluation(*lows)).startswith(expected)


def test_of_a_model_that_has_learned_nothing_the_verdict_says_so() -> None:
    said = long_context_verdict(_evaluation(0.2, 0.1, unigram=2.5))
    assert said.startswith("Too early to tell") and "2.500 bits a byte" in said and "Yes" not in said


def test_text_on_a_page_is_escaped() -> None:
    page = Page("<a>", "b & c")
    page.sample("<script>", "&")
    page.table([("<n>", "<v>")])
    html = page.html()
    assert "<script>" not in html and "<a>" not in html and "<v>" not in html
    assert "&lt;script&gt;" in html and "b &amp; c" in html


def test_the_verdict_on_tokens_says_how_many_bytes_they_are() -> None:
    verdict = long_context_verdict(replace(_evaluation(0.2), unit="tokens", scored_bytes=768 * 3))
    assert verdict.startswith("Yes, the model uses its long context: the same tokens cost")
    assert verdict.endswith(" A token is 3.00 bytes here.")
    assert "A token" not in long_context_verdict(_evaluation(0.2))
