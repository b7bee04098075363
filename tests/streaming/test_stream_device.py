"""Streams on a CUDA device, the captured step among them. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from patterns import relative_error
from streams import Stream, read, streams

from longnet import LongNetConfig, LongNetLM, dilated_attention, stream_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:segment_lengths=.*to no head"),
]


@given(stream=streams())
@settings(max_examples=60)
def test_any_split_gives_the_rows_of_one_call(stream):
    out = read(stream, stream.cache("cuda"), [x.cuda() for x in stream.tensors()])
    assert relative_error(out.cpu(), stream.expected()) < 1e-10


@given(stream=streams())
@settings(max_examples=30)
def test_steps_give_the_rows_of_one_call(stream):
    stream = replace(stream, cuts=tuple(range(stream.length)))
    out = read(stream, stream.cache("cuda"), [x.cuda() for x in stream.tensors()])
    assert relative_error(out.cpu(), stream.expected()) < 1e-10


def test_bf16_with_single_token_tails():
    stream = Stream(((512, 1), (2048, 4)), 5000, (1024, 3000, 4096, *range(4950, 5000)), kv_heads=8, head_dim=64)
    double = [x.cuda() for x in stream.tensors()]
    half = [x.bfloat16() for x in double]
    stream = replace(stream, dtype=torch.bfloat16)
    out = read(stream, stream.cache("cuda"), half)
    expected = dilated_attention(*(x.double() for x in half), *stream.pattern, is_causal=True)
    full = dilated_attention(*half, *stream.pattern, is_causal=True)
    assert relative_error(out, expected) < 1.5 * relative_error(full, expected)


def test_a_captured_step_is_repeated_over_segment_boundaries():
    stream = Stream(((16, 1), (48, 4), (64, 8)), 200, (37,), batch=2, kv_heads=4, group=2, dtype=torch.float32)
    tensors = [x.cuda() for x in stream.tensors()]
    cache = stream.cache("cuda")
    read(stream, cache, tensors, last=37)
    token = [x[:, :, 37:38].clone() for x in tensors]
    # Warm up on a copy, off the stream that is captured.
    stream_attention(*token, cache.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream_attention(*token, cache)
    cache.moved(-1, on_device=False)  # capturing ran nothing
    outs = []
    for position in range(37, stream.length):
        for static, x in zip(token, tensors, strict=True):
            static.copy_(x[:, :, position : position + 1])
        graph.replay()
        cache.moved(1, on_device=False)
        outs.append(out.clone())
    assert cache.position == int(cache.position_tensor) == stream.length
    assert relative_error(torch.cat(outs, 2).cpu(), stream.expected()[:, :, 37:]) < 1e-5


def test_a_captured_step_of_a_model_is_repeated_over_segment_boundaries():
    """xPos included: its angles follow the position on the device."""
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig.preset("nano"), device="cuda").eval()
    tokens = torch.randint(256, (2, 150), device="cuda")
    with torch.inference_mode():
        expected = model(tokens)
        cache = model.new_cache(2)
        model(tokens[:, :37], cache=cache)
        token = tokens[:, 37:38].clone()
        model(token, cache=cache.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, cache=cache)
        cache.moved(-1, on_device=False)
        for position in range(37, 150):
            token.copy_(tokens[:, position : position + 1])
            graph.replay()
            cache.moved(1, on_device=False)
            torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=1e-3, atol=1e-3)
    assert cache.position == 150
