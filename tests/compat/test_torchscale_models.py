"""torchscale's models against a straightforward implementation, and back to their state dicts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import upstream
from torch import Tensor

from longnet import LongNetConfig, LongNetEncoder, LongNetLM
from longnet.compat import decoder_from_torchscale, encoder_from_torchscale, longvit_from_torchscale, to_torchscale

HEADS, DIM, HIDDEN, VOCABULARY = 4, 16, 24, 11
# 45 is no multiple of 2.
SHIFTED: Any = {"heads": HEADS, "segment_lengths": (16, 45), "dilation_rates": (1, 2)}
WHOLE: Any = {"heads": HEADS, "segment_lengths": (16, 48), "dilation_rates": (1, 2)}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5


def state(
    *, tokens: bool = True, head: str = "", norm: bool = True, xpos: bool = False, prefix: str = ""
) -> dict[str, Tensor]:
    """A random state dict of two layers, as torchscale names them."""
    torch.manual_seed(0)
    linears = {f"self_attn.{one}_proj": (DIM, DIM) for one in "qkv"} | {"self_attn.out_proj": (DIM, DIM)}
    linears |= {"ffn.fc1": (HIDDEN, DIM), "ffn.fc2": (DIM, HIDDEN)}
    norms = {
        "self_attn_layer_norm": DIM,
        "self_attn.inner_attn_ln": DIM,
        "final_layer_norm": DIM,
        "ffn.ffn_layernorm": HIDDEN,
    }
    found = {}
    for layer in range(2):
        at = f"{prefix}layers.{layer}."
        for name, (rows, columns) in linears.items():
            found |= {f"{at}{name}.weight": 2 * draw(rows, columns), f"{at}{name}.bias": draw(rows)}
        for name, channels in norms.items():
            found |= {f"{at}{name}.weight": 1 + draw(channels), f"{at}{name}.bias": draw(channels)}
        if xpos:
            half = torch.arange(0, DIM // HEADS, 2)
            found[f"{at}self_attn.xpos.scale"] = (half + 0.4 * (DIM // HEADS)) / (1.4 * (DIM // HEADS))
    if norm:
        found |= {f"{prefix}layer_norm.weight": 1 + draw(DIM), f"{prefix}layer_norm.bias": draw(DIM)}
    if tokens:
        found["embed_tokens.weight"] = draw(VOCABULARY, DIM)
    if head:
        found["output_projection.weight"] = found["embed_tokens.weight"] if head == "tied" else draw(VOCABULARY, DIM)
    return found


def expected(weights: dict[str, Tensor], x: Tensor, pattern: dict[str, Any], causal: bool, xpos: bool) -> Tensor:
    base = 512.0 if xpos else None
    series = (HEADS, pattern["segment_lengths"], pattern["dilation_rates"])
    x = upstream.layers(weights, x, *series, is_causal=causal, xpos_base=base)[-1]
    if "layer_norm.weight" in weights:
        x = F.layer_norm(x, (DIM,), weights["layer_norm.weight"], weights["layer_norm.bias"], 1e-5)
    return x


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).detach().abs().max() / want.detach().abs().max()) < 1e-9


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("pattern", [SHIFTED, WHOLE])
def test_an_encoder(pattern: dict[str, Any], xpos: bool) -> None:
    weights = state(xpos=xpos)
    model = encoder_from_torchscale(weights, **pattern)
    assert isinstance(model, LongNetEncoder) and not model.training
    tokens = torch.randint(VOCABULARY, (2, 110))
    want = expected(weights, weights["embed_tokens.weight"][tokens], pattern, False, xpos)
    assert close(model(tokens), want)
    scaled = encoder_from_torchscale(weights, **pattern, scale_embedding=True)
    assert close(scaled(tokens), expected(weights, 4 * weights["embed_tokens.weight"][tokens], pattern, False, xpos))
    assert not close(encoder_from_torchscale(weights, **pattern, torchscale_compat=False)(tokens), want)
    assert same(to_torchscale(model), weights)


def test_an_encoder_of_embeddings_without_a_last_norm() -> None:
    weights = state(tokens=False, norm=False)
    model = encoder_from_torchscale(weights, **SHIFTED)
    x = draw(1, 100, DIM)
    assert close(model(embeddings=x), expected(weights, x, SHIFTED, False, False))
    assert same(to_torchscale(model), weights)


@pytest.mark.parametrize("head", ["tied", "own"])
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("pattern", [SHIFTED, WHOLE])
def test_a_decoder(pattern: dict[str, Any], xpos: bool, head: str) -> None:
    weights = state(head=head, xpos=xpos)
    model = decoder_from_torchscale(weights, **pattern)
    assert isinstance(model, LongNetLM) and (model.head is None) == (head == "tied")
    tokens = torch.randint(VOCABULARY, (2, 110))
    hidden = expected(weights, weights["embed_tokens.weight"][tokens], pattern, True, xpos)
    assert close(model(tokens), hidden @ weights["output_projection.weight"].T)
    assert same(to_torchscale(model), weights)


def test_a_decoder_generates_where_its_cache_is_exact() -> None:
    tokens = torch.randint(VOCABULARY, (1, 60))
    model = decoder_from_torchscale(state(head="own"), **WHOLE)
    got = model.generate(tokens, 3, temperature=0)
    for place in range(60, 63):
        assert got[0, place] == model(got[:, :place])[0, -1].argmax()
    with pytest.raises(ValueError, match="torchscale_compat=True: a cache computes the exact definition"):
        decoder_from_torchscale(state(head="own"), **SHIFTED).generate(tokens, 3, temperature=0)


def test_a_longvit() -> None:
    weights = state(tokens=False, norm=False, prefix="encoder.")
    weights |= {"patch_embed.proj.weight": draw(DIM, 3, 4, 4), "patch_embed.proj.bias": draw(DIM)}
    weights["pos_embed"] = draw(1, 100, DIM)
    model = longvit_from_torchscale(weights, **SHIFTED)
    image = draw(2, 3, 40, 40)
    # A convolution whose stride is its size is a product with each patch.
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 100, 48)
    x = patches @ weights["patch_embed.proj.weight"].reshape(DIM, 48).T + weights["patch_embed.proj.bias"]
    x = x + weights["pos_embed"]
    inside = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    assert close(model(image), expected(inside, x, SHIFTED, False, False))
    assert same(to_torchscale(model), weights)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 40, 40\)"):
        model(image[:, :, :36])


def longvit_state() -> dict[str, Tensor]:
    weights = state(tokens=False, norm=False, prefix="encoder.")
    weights |= {"patch_embed.proj.weight": draw(DIM, 3, 4, 4), "patch_embed.proj.bias": draw(DIM)}
    return weights | {"pos_embed": draw(1, 25, DIM)}


def test_positions_of_a_larger_image() -> None:
    weights = longvit_state()
    model = longvit_from_torchscale(weights, **SHIFTED, image_size=52)
    assert model(draw(1, 3, 52, 52)).shape == (1, 169, DIM) and model.size == 52

    def kernel(distance: float) -> float:
        """Keys' cubic convolution with a = -3/4, which bicubic means in torch."""
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    # Centres of patches lie at (place + 1/2) * 5 / 13 - 1/2 of the old grid, whose edge goes on outside.
    rows = torch.zeros(13, 5, dtype=torch.float64)
    for place in range(13):
        centre = (place + 0.5) * 5 / 13 - 0.5
        for at in range(math.floor(centre) - 1, math.floor(centre) + 3):
            rows[place, min(max(at, 0), 4)] += kernel(centre - at)
    want = torch.einsum("ia,jb,abc->ijc", rows, rows, weights["pos_embed"].view(5, 5, DIM)).view(1, 169, DIM)
    torch.testing.assert_close(model.pos_embed.detach(), want, rtol=1e-12, atol=1e-12)
    assert same(to_torchscale(longvit_from_torchscale(weights, **SHIFTED, image_size=20)), weights)
    for size in (50, 2):
        with pytest.raises(ValueError, match=f"image_size={size} with patches of 4 pixels.*a multiple of the patch"):
            longvit_from_torchscale(weights, **SHIFTED, image_size=size)


def test_wrapped_weights_are_opened_and_said(caplog: pytest.LogCaptureFixture) -> None:
    weights, tokens = longvit_state(), state()
    wrapped: Any = {"model": {f"module.backbone.{name}": tensor for name, tensor in weights.items()}, "epoch": 3}
    with caplog.at_level("INFO", "longnet"):
        assert same(to_torchscale(longvit_from_torchscale(wrapped, **SHIFTED)), weights)
    said = [record.message for record in caplog.records]
    assert said == ["weights: took the tensors in 'model'", "weights: took the prefix 'module.backbone.' off all names"]
    wrapped = {"state_dict": {f"_orig_mod.{name}": tensor for name, tensor in tokens.items()}}
    assert same(to_torchscale(encoder_from_torchscale(wrapped, **SHIFTED)), tokens)
    tokens = state(head="own")
    assert same(
        to_torchscale(decoder_from_torchscale({f"module.{k}": v for k, v in tokens.items()}, **SHIFTED)), tokens
    )


def test_gradients_reach_every_weight() -> None:
    model = encoder_from_torchscale(state(), **SHIFTED)
    model(torch.randint(VOCABULARY, (1, 100))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_does_not_fit() -> None:
    weights = state()
    del weights["layers.1.ffn.fc2.bias"]
    weights["layers.0.moe_layer.gate"] = draw(3)
    weights["layer_norm.bias"] = draw(3)
    with pytest.raises(ValueError, match="do not fit") as caught:
        encoder_from_torchscale(weights, **WHOLE)
    for said in ("missing: layers.1.ffn.fc2.bias", "unexpected: layers.0.moe_layer.gate", "layer_norm.bias (3,)"):
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="missing: output_projection.weight"):
        decoder_from_torchscale(state(), **WHOLE)
    with pytest.raises(ValueError, match="expected a state dict of torchscale"):
        encoder_from_torchscale({"x": draw(1)}, **WHOLE)
    below = {f"beit3.{name}": one for name, one in state(prefix="encoder.").items()} | {"head.weight": draw(2, DIM)}
    with pytest.raises(ValueError, match=r"no encoder\.layers\.0 among \['beit3.*under 'beit3\.'.*without this prefix"):
        longvit_from_torchscale(below, **WHOLE)
    with pytest.raises(ValueError, match=r"no layers\.0 among.*under 'encoder\.'"):
        encoder_from_torchscale(state(prefix="encoder."), **WHOLE)
    with pytest.raises(ValueError, match="'pos_embed'"):
        longvit_from_torchscale(state(prefix="encoder.") | {"patch_embed.proj.weight": draw(1, 1, 1, 1)}, **WHOLE)
    with pytest.raises(ValueError, match="dim=16 is not divisible by heads=5"):
        encoder_from_torchscale(state(), **(WHOLE | {"heads": 5}))
    with pytest.raises(TypeError, match="expected a LongNetEncoder"):
        to_torchscale(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm='rms'"):
        to_torchscale(LongNetEncoder(LongNetConfig.preset("nano", causal=False, norm="rms", head_offsets="blocked")))
