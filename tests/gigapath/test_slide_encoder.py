"""The slide encoder against a straightforward one, and what it promises about batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import upstream
from slides import GRID, TILE, encoder, slides
from torch import Tensor, nn

from longnet.attention.functional import dilated_attention
from longnet.geometry import Pattern
from longnet.gigapath import ClassificationHead, SlideEncoder
from longnet.gigapath.passes import embed
from longnet.gigapath.readout import first_token_weights, log_times, read_by_first_token


def reference(model: SlideEncoder, x: Tensor, coords: Tensor, all_layers: bool, global_pool: bool) -> list[Tensor]:
    weights = {name: tensor.double() for name, tensor in model.upstream_state_dict().items()}
    pattern = (16, model.config.segment_lengths, model.config.dilation_rates)
    with torch.no_grad():
        return upstream.slide_encoder(
            weights, x.double(), coords, *pattern, grid=GRID, all_layers=all_layers, global_pool=global_pool
        )


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def test_the_patterns_lengths_are_no_multiples_of_their_rates() -> None:
    assert encoder().config.segment_lengths == (1024, 1217, 1448, 1722, 2048)
    assert SlideEncoder(16, 1).config.segment_lengths == (1024, 5792, 32768, 185363, 1048576)


@pytest.mark.parametrize("tiles", [600, 1100, 2200])
@pytest.mark.parametrize("global_pool", [False, True])
def test_outputs_are_upstreams(tiles: int, global_pool: bool) -> None:
    model = encoder(global_pool=global_pool)
    x, coords = slides(tiles)
    for all_layers in (True, False):
        want = reference(model, x, coords, all_layers, global_pool)
        got = model(x, coords, all_layer_embed=all_layers)
        assert len(got) == len(want) == (3 if all_layers else 1)
        for one, other in zip(got, want, strict=True):
            assert one.shape == (1, 32)
            assert error(one, other) < 1e-9
    assert error(model.float()(x.float(), coords)[0], want[0]) < 1e-5


@pytest.fixture(scope="module")
def upstreams_gradient() -> Tensor:
    """Of the square of the result, with respect to the tiles."""
    model = encoder()
    x, coords = slides(1300)
    x.requires_grad_()
    weights = model.upstream_state_dict()
    pattern = (16, model.config.segment_lengths, model.config.dilation_rates)
    out = upstream.slide_encoder(weights, x, coords, *pattern, grid=GRID)[0]
    return torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("recompute", ["ffn", "block", "elementwise", "none"])
def test_gradients_are_those_of_upstreams_outputs(recompute: str, upstreams_gradient: Tensor) -> None:
    model = encoder(recompute=recompute)
    x, coords = slides(1300)
    x.requires_grad_()
    (found,) = torch.autograd.grad(model(x, coords)[0].square().sum(), x)
    assert error(found, upstreams_gradient) < 1e-9


def test_the_exact_definition_without_compat(monkeypatch: pytest.MonkeyPatch) -> None:
    x, coords = slides(1300)
    model = encoder(torchscale_compat=False)

    def exact(
        q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rates: tuple[int, ...], _: bool
    ) -> tuple[Tensor, None]:
        return dilated_attention(q, k, v, lengths, rates, head_offsets="blocked"), None

    monkeypatch.setattr(upstream, "attention", exact)
    got = model(x, coords)[0]
    assert error(got, reference(model, x, coords, False, False)[0]) < 1e-9
    assert error(got, encoder()(x, coords)[0]) > 1e-6


@pytest.mark.parametrize("global_pool", [False, True])
def test_each_slide_of_a_batch_is_as_if_alone(global_pool: bool) -> None:
    model = encoder(global_pool=global_pool)
    x, coords = slides(1200, batch=4)
    absent = torch.zeros(4, 1200, dtype=torch.bool)
    absent[0, 700:] = True
    absent[1, ::3] = True
    absent[2, :500] = True
    x[absent], coords[absent] = torch.nan, -1e9
    for all_layers in (False, True):
        got = model(x, coords, all_layers, padding_mask=absent)
        for row in range(4):
            present = ~absent[row]
            alone = model(x[row : row + 1, present], coords[row : row + 1, present], all_layers)
            for one, other in zip(got, alone, strict=True):
                torch.testing.assert_close(one[row], other[0], rtol=1e-12, atol=1e-12)


def test_slides_of_one_size_share_a_call_and_keep_their_order() -> None:
    model = encoder(1)
    x, coords = slides(90, batch=3)
    absent = torch.zeros(3, 90, dtype=torch.bool)
    absent[0, :40] = absent[2, 50:] = True
    absent[1, 3] = True
    got = model(x, coords, padding_mask=absent)[0]
    for row in range(3):
        present = ~absent[row]
        want = model(x[row : row + 1, present], coords[row : row + 1, present])[0]
        torch.testing.assert_close(got[row], want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiles", [700, 1500])
def test_what_the_class_token_attends_to(tiles: int) -> None:
    model = encoder()
    x, coords = slides(tiles)
    got = model.attention_weights(x, coords)
    assert got.shape == (2, 1, 16, tiles)
    # The weights are what the result changes by with the values.
    state = embed(model, model._slide(x, coords, None))[0].detach()
    for layer, block in enumerate(model.blocks):
        attention, y = block.attention, block.attention_norm(state)
        q, k = (p(y).unflatten(-1, (16, 2)).transpose(1, 2).detach() for p in (attention.q_proj, attention.k_proj))
        v = torch.zeros_like(k).requires_grad_()
        out = upstream.attention(q, k, v, model.config.segment_lengths, model.config.dilation_rates)[0]
        (weights,) = torch.autograd.grad(out[:, :, 0, 0].sum(), v)
        assert (got[layer] - weights[:, :, 1:, 0]).abs().max() < 1e-10
        state = upstream_layer(model, state, layer).detach()
    assert (got.sum(-1) < 1).all()


def upstream_layer(model: SlideEncoder, x: Tensor, layer: int) -> Tensor:
    """One layer of the reference."""
    prefix = f"encoder.layers.{layer}."
    weights = {
        name.replace(prefix, "layers.0."): tensor
        for name, tensor in model.upstream_state_dict().items()
        if name.startswith(prefix)
    }
    return upstream.layers(weights, x, 16, model.config.segment_lengths, model.config.dilation_rates)[1]


def test_weights_of_a_batch_lie_where_its_tiles_do() -> None:
    model = encoder(1)
    x, coords = slides(60, batch=2)
    absent = torch.zeros(2, 60, dtype=torch.bool)
    absent[0, 10:30] = True
    got = model.attention_weights(x, coords, absent)
    alone = model.attention_weights(x[:1, ~absent[0]], coords[:1, ~absent[0]])
    assert not got[:, 0, :, 10:30].any()
    torch.testing.assert_close(got[:, 0][:, :, ~absent[0]], alone[:, 0])
    torch.testing.assert_close(got[:, 1], model.attention_weights(x[1:], coords[1:])[:, 0])


def test_the_positions_that_the_first_token_reads() -> None:
    pattern = Pattern.parse((32, 50, 200), (1, 3, 8), "blocked")
    for length in (1, 20, 33, 130, 300):
        read = read_by_first_token(pattern, 4, length, torch.device("cpu"))
        query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 4, length, 8)
        shape = (pattern, 4, length, torch.device("cpu"), torch.float32)
        weights = first_token_weights(query, key, log_times(*shape))
        assert read.tolist() == [p for p in range(length) if bool((weights[0, :, p] > 0).any())]
        some = first_token_weights(query, key[:, :, read], log_times(*shape, True))
        torch.testing.assert_close(some, weights[:, :, read])


def test_of_a_large_slide_a_quarter_is_read() -> None:
    pattern = Pattern.parse((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16), "blocked")
    assert len(read_by_first_token(pattern, 16, 45_681, torch.device("cpu"))) == 11_767


def test_a_layer_of_which_some_tokens_are_wanted() -> None:
    block = encoder(2).blocks[0]
    x = torch.randn(2, 3000, 32, dtype=torch.float64)
    pattern = block.attention.pattern
    read = read_by_first_token(pattern, 16, 3000, x.device)
    assert len(read) < 3000
    expected = block(x)
    torch.testing.assert_close(block(x, rows=read), expected[:, read])
    shape = (pattern, 16, 3000, x.device, x.dtype)
    torch.testing.assert_close(block(x, times=log_times(*shape)), expected[:, :1])
    torch.testing.assert_close(block(x[:, read], times=log_times(*shape, True)), expected[:, :1])


@pytest.mark.parametrize("recompute", ["ffn", "block", "elementwise"])
def test_what_is_computed_again_has_the_same_dropout(recompute: str) -> None:
    x, coords = slides(80, batch=3)
    grads = []
    for how in ("none", recompute):
        model = encoder(3, recompute=how, dropout=0.3, drop_path=0.5).train()
        torch.manual_seed(1)
        model(x, coords)[0].square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model = encoder(2, dropout=0.3, drop_path=0.5)
    x, coords = slides(40)
    assert torch.equal(model(x, coords)[0], model(x, coords)[0])
    model.train()
    assert not torch.equal(model(x, coords)[0], model(x, coords)[0])


@pytest.mark.parametrize("recompute", ["ffn", "block", "none"])
def test_bytes_kept_for_the_backward_pass(recompute: str) -> None:
    tiles, channels = 255, 32
    per_layer = []
    for layers in (1, 3):
        model = encoder(layers, torch.float32, recompute=recompute).train()
        x, coords = slides(tiles, dtype=torch.float32)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model(x, coords)
        per_layer.append(sum(size for place, size in kept.items() if place not in weights))
    measured = (per_layer[1] - per_layer[0]) / 2 / ((tiles + 1) * channels)
    # gigapath/layer.py counts 14, and a head of 2 channels has 4 more for its lse; norms keep 8 a token, weights are cast.
    weights_cast = 2 * 12 * channels**2 / ((tiles + 1) * channels)
    bound = {"ffn": 14 + 2 + 8 / channels + weights_cast, "block": 4.1, "none": 200.0}[recompute]
    assert measured <= bound
    if recompute == "none":
        assert measured > 40


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model = encoder(dtype=torch.float32)
    x, coords = slides(300, dtype=torch.float32)
    want = model(x, coords)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, coords)[0]
        assert embed(model, model._slide(x, coords, None))[0].dtype == torch.float32
    assert error(got, want) < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_coordinates_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    model = encoder(1, torch.float32)
    x, coords = slides(10, dtype=torch.float32)
    exact = {torch.bfloat16: "256", torch.float16: "2,048", torch.float8_e5m2: "8"}[dtype]
    match = f"coords has dtype {dtype}, which rounds pixels beyond {exact}: expected integers, float32 or float64"
    for run in (model, model.attention_weights, ClassificationHead(model, 2)):
        with pytest.raises(TypeError, match=match):
            run(x, coords.to(dtype))
        with pytest.raises(TypeError, match=match):
            run(x, coords.to(dtype), padding_mask=torch.zeros(1, 10, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_places_tiles_by_exact_pixels(dtype: torch.dtype) -> None:
    x, coords = slides(200, dtype=torch.float32)
    coords = coords.floor()
    # Where in its cell a tile lies is no matter, so a pixel that is rounded into another cell would show.
    corners = coords.long() // TILE * TILE
    model, single = encoder(1, dtype), encoder(1, torch.float32)
    want = model(x.to(dtype), corners)[0]
    for places in (coords, coords.double(), coords.int(), coords.to(torch.uint16)):
        assert torch.equal(model(x.to(dtype), places)[0], want)
    with torch.autocast("cpu", dtype):
        assert torch.equal(single(x, coords)[0], single(x, corners)[0])


def test_integers_that_cannot_hold_the_tile_size() -> None:
    model = encoder(1)
    x, coords = slides(20)
    coords = coords.remainder(128).floor()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(model(x, coords.to(dtype))[0], model(x, coords)[0])
        mask = torch.arange(20)[None] > 15
        assert torch.equal(model(x, coords.to(dtype), padding_mask=mask)[0], model(x, coords, padding_mask=mask)[0])


def test_the_tile_size_is_no_part_of_the_segment_lengths() -> None:
    published = (1024, 5792, 32768, 185363, 1048576)
    assert SlideEncoder(16, 1, tile_size=512).config.segment_lengths == published
    # As in the original, where the side of the largest slide is named.
    assert SlideEncoder(16, 1, tile_size=512, max_wsi_size=524288).config.segment_lengths == published
    other = (1024, 4096, 16384, 65536, 262144)
    assert SlideEncoder(16, 1, tile_size=512, max_wsi_size=262144).config.segment_lengths == other
    assert SlideEncoder(16, 1, max_wsi_size=131072).config.segment_lengths == other


def test_a_tile_size_that_is_set_later_moves_tiles_alone() -> None:
    model = encoder(1, torch.float32)
    x, coords = slides(200, dtype=torch.float32)
    coords = coords.floor()
    want, attended = model(x, coords)[0], model.attention_weights(x, coords)
    lengths = model.config.segment_lengths
    # NumPy's integer is what an HDF5 attribute holds.
    for tile_size in (512, np.int64(512)):
        model.tile_size = tile_size  # type: ignore[assignment]
        for places in (2 * coords, 2 * coords.long()):
            assert torch.equal(model(x, places)[0], want)
            assert torch.equal(model.attention_weights(x, places), attended)
    assert model.config.segment_lengths == lengths


def test_bad_input() -> None:
    model = encoder(1)
    x, coords = slides(10)
    for name, value, match in [
        ("coords", coords - 1e6, "outside of the grid"),
        ("coords", coords + GRID * 256, "outside of the grid"),
        ("coords", coords * torch.nan, "outside of the grid"),
        ("coords", coords[:, :5], r"coords has shape \(1, 5, 2\)"),
        ("x", x[0], r"x has shape \(10, 24\)"),
        ("x", x[..., :5], "x has shape"),
        ("padding_mask", torch.zeros(1, 9, dtype=torch.bool), "padding_mask has shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            model(**{"x": x, "coords": coords, name: value})
    for name, value, match in [
        ("x", x.float(), "x has dtype torch.float32 and the encoder torch.float64"),
        ("x", coords[..., :1].long().expand(1, 10, 24), "expected a floating dtype"),
        ("x", [1.0], "x has type list"),
        ("coords", coords > 0, "coords has dtype torch.bool"),
        ("padding_mask", torch.zeros(1, 10), "padding_mask has dtype"),
    ]:
        with pytest.raises(TypeError, match=match):
            model(**{"x": x, "coords": coords, name: value})
    with pytest.raises(ValueError, match="without tiles"):
        encoder(1, global_pool=True)(x[:, :0], coords[:, :0])
    assert model(x[:, :0], coords[:, :0])[0].shape == (1, 32)
    assert model(x[:0], coords[:0], padding_mask=torch.zeros(0, 10, dtype=torch.bool))[0].shape == (0, 32)
    for options, match in [
        ({"recompute": "all"}, "recompute='all' is unknown"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"max_wsi_size": 100}, "max_wsi_size=100"),
        ({"slide_ngrids": 0}, "slide_ngrids=0"),
        ({"cuda_graphs": True}, "cuda_graphs=True with compiled=False"),
        ({"dim": 48, "heads": 5}, "not divisible"),
    ]:
        with pytest.raises(ValueError, match=match):
            SlideEncoder(**{"dim": 32, "layers": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tile_size=2.0"):
        SlideEncoder(32, 1, tile_size=2.0)  # type: ignore[arg-type]


def test_a_feed_forward_that_is_replaced_or_hooked_is_called() -> None:
    model, (x, coords) = encoder(3), slides(40)
    expected = model(x, coords)[0]
    calls: list[int] = []
    model.blocks[0].feed_forward.register_forward_hook(lambda *_: calls.append(0))
    model.blocks[1].feed_forward = nn.Sequential(model.blocks[1].feed_forward, nn.Identity())
    model.blocks[1].feed_forward[1].register_forward_hook(lambda *_: calls.append(1))
    model.blocks[2].feed_forward.chunk = 16
    assert error(model(x, coords)[0], expected) < 1e-12
    assert calls == [0, 1]


def test_shapes_alone_on_the_meta_device():
    model = SlideEncoder(32, 2, 4, in_dim=24, slide_ngrids=20, device="meta")
    x, coords = torch.randn(2, 30, 24, device="meta"), torch.zeros(2, 30, 2, device="meta")
    (out,) = model(x, coords)
    assert out.is_meta and out.shape == (2, 32)
    with pytest.raises(ValueError, match="padding_mask is on the meta device"):
        model(x, coords, padding_mask=torch.zeros(2, 30, dtype=torch.bool, device="meta"))
