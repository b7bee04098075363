"""Generation on a GPU: steps replayed from a CUDA graph give the same tokens, and other lengths compile nothing."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import pytest
import torch

from longnet import LongNetConfig, LongNetLM
from longnet.geometry import Pattern
from longnet.models import captured, generation
from longnet.nn.position import Positions, XPos, fused, rotate

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*to no head:UserWarning"),
]

KINDS = {
    "published": {"segment_lengths": (64, 128, 512), "dilation_rates": (1, 2, 6)},
    "types": {
        "layer_types": ("sliding_attention", "strided_attention"), "sliding_window": 40, "stride": 4, "shift_keys": True,
        "far_positions": False,
    },
    "full": {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 40, "kv_heads": 2},
    "torch's steps": {"head_numbers": ((0, 2, 3), (0, 1, 2, 3))},
}  # fmt: skip


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> LongNetLM:
    torch.manual_seed(0)
    # With a head of its own: tied, a model that has learnt nothing repeats its last token.
    shape = {"layers": 2, "dim": 256, "heads": 4, "vocab_size": 97, "tie_embeddings": False}
    return LongNetLM(LongNetConfig(**shape, **KINDS[kind])).to("cuda", dtype).eval()


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(length)).cuda()


@pytest.fixture
def counted(monkeypatch):
    """How many steps were captured."""
    made = []
    original = captured.CapturedStep._capture

    def capture(self):
        # Not the step itself: its memory is to be given back.
        made.append(1)
        original(self)

    monkeypatch.setattr(captured.CapturedStep, "_capture", capture)
    return made


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": (1, 2, 3)},
        {"temperature": 0.0, "eos": (5, 17), "pad": 3},
    ],
)
def test_replayed_steps_give_the_same_tokens(kind, options, counted, monkeypatch):
    model = model_of(kind)
    mask = torch.zeros(3, 70, dtype=torch.bool, device="cuda")
    mask[1, :9], mask[2, -4:] = True, True
    for length, count, padding in ((70, 90, None), (70, 90, mask), (3, 20, None)):
        call = partial(model.generate, prompts(3, length), count, key_padding_mask=padding, **options)
        got = call()
        # Prompts of one length each are groups of their own.
        assert len(counted) == (1 if padding is None else 3)
        counted.clear()
        with monkeypatch.context() as patch:
            patch.setattr(generation, "can_capture", lambda model, device: False)
            want = call()
        assert not counted
        assert torch.equal(got, want)


def test_many_calls_in_turn_and_memory_that_is_given_back(counted):
    """Graphs of earlier calls end while others are captured."""
    model = model_of("published")
    expected = [model.generate(prompts(1, length), 30, temperature=0) for length in (20, 31)]
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated()
    gc.collect()
    for turn in range(8):
        gc.set_threshold(20 + turn)
        try:
            got = [model.generate(prompts(1, length), 30, temperature=0) for length in (20, 31)]
        finally:
            gc.set_threshold(700, 10, 10)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(counted) == 18
    del got
    assert torch.cuda.memory_allocated() <= used + (1 << 20)


def test_torchs_own_generator_goes_on_as_without_a_graph(monkeypatch):
    model, found = model_of("published"), []
    for capture in (True, False):
        with monkeypatch.context() as patch:
            if not capture:
                patch.setattr(generation, "can_capture", lambda model, device: False)
            torch.manual_seed(7)
            found.append((model.generate(prompts(2, 20), 40), torch.rand(3, device="cuda")))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_do_not_overwrite_what_was_handed_out(counted):
    model, streamed = model_of("published"), []
    tokens = model.generate(prompts(2, 20), 40, temperature=0, streamer=streamed.append)
    assert counted and torch.equal(torch.stack(streamed, 1), tokens[:, 20:])


def test_what_python_does_is_done(counted):
    model = model_of("published")
    expected = model.generate(prompts(1, 20), 40, temperature=0)
    assert len(counted) == 1
    counted.clear()
    calls = []
    handle = model.blocks[1].register_forward_hook(lambda *arguments: calls.append(0))
    assert torch.equal(model.generate(prompts(1, 20), 40, temperature=0), expected)
    assert len(calls) == 40 and not counted
    handle.remove()

    class Mine(torch.nn.GELU):
        pass

    model.blocks[0].dropout = Mine()
    model.generate(prompts(1, 20), 40, temperature=0)
    assert not counted
    model.blocks[0].dropout = torch.nn.Dropout(0.0)
    drawn = []
    logits, model.logits = model.logits, lambda hidden: drawn.append(0) or logits(hidden)
    assert torch.equal(model.generate(prompts(1, 20), 40, temperature=0), expected)
    assert len(drawn) == 40 and not counted
    del model.logits
    # Few tokens are not worth a capture.
    model.generate(prompts(1, 20), 4, temperature=0)
    assert not counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_transformers_are_replayed(dtype, counted):
    hf = pytest.importorskip("longnet.hf")
    model = model_of("published", dtype)
    adapted, options = hf.LongNetForCausalLM.from_longnet(model), {"min_new_tokens": 40, "do_sample": False}
    prompt = prompts(2, 20)
    given = [
        adapted.generate(
            prompt,
            max_new_tokens=40,
            cache_implementation=kind,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        for kind in ("dynamic", "static", "static")
    ]
    assert len(counted) == 2
    for one in given[1:]:
        assert torch.equal(one.sequences, given[0].sequences)
        # What was handed out is not written over.
        for got, want in zip(one.logits, given[0].logits, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["autocast", "inference", "bfloat16"])
def test_modes(mode, counted, monkeypatch):
    model = model_of("published", torch.bfloat16 if mode == "bfloat16" else torch.float32)
    contexts = {
        "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
        "inference": torch.inference_mode,
        "bfloat16": torch.no_grad,
    }
    found = []
    for capture in (True, False):
        with monkeypatch.context() as patch, contexts[mode]():
            if not capture:
                patch.setattr(generation, "can_capture", lambda model, device: False)
            found.append(model.generate(prompts(2, 300), 60, temperature=0))
    assert len(counted) == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["published", "types", "full"])
def test_another_length_compiles_nothing(kind, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    model = model_of(kind, torch.bfloat16)
    made = []
    for length, count in ((530, 20), (531, 33), (77, 10), (9, 100), (1200, 12), (600, 700), (2, 8)):
        model.generate(prompts(1, length), count, temperature=0)
        made.append(len(list(Path(tmp_path).rglob("*.cubin"))))
    # Filled-up copies are the only kernel that the first length has no need of.
    assert made[-1] <= made[0] + 1, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("pattern", [Pattern.parse((8, 32), (1, 4)), Pattern.compose(window=16)])
@pytest.mark.parametrize("length", [1, 100])
def test_rotated_tokens(pattern, by_row, dtype, length):
    xpos = XPos(48, pattern, True)
    torch.manual_seed(0)
    query, key = (torch.randn(3, length, heads, 48, device="cuda").to(dtype).transpose(1, 2) for heads in (4, 2))
    offsets = torch.tensor([-5, 0, 77], device="cuda")[:, None] if by_row else 0
    for position in (0, 31, 100_003, 2**31 + 5):
        at = Positions(position, length, streaming=True, counter=torch.tensor(position).cuda(), segment_offset=offsets)
        assert fused.fits(query, key)
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        got = xpos(*leaves, at)
        upstream = [torch.randn_like(x) for x in got]
        grads = torch.autograd.grad(got, leaves, upstream)
        tables = xpos.tables(length, torch.float64, "cuda", position, streaming=True, segment_offset=offsets)
        if tables[0].dim() == 3:
            tables = tuple(table.unsqueeze(1) for table in tables)
        for one, x, grad, given, (cos, sin) in zip(
            got, (query, key), grads, upstream, (tables[:2], tables[2:]), strict=True
        ):
            for result, want in ((one, rotate(x.double(), cos, sin)), (grad, rotate(given.double(), cos, -sin))):
                assert (result - want).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * want.norm()
