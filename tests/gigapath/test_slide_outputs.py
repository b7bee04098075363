"""What can be taken out of the encoder, and which coordinates it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import upstream
from slides import GRID, encoder, slides

from longnet.gigapath import slide_outputs
from longnet.gigapath.outputs import OUTPUTS


@pytest.mark.parametrize("global_pool", [False, True])
def test_outputs_are_those_of_upstreams_states(global_pool: bool) -> None:
    model = encoder(global_pool=global_pool)
    x, coords = slides(300)
    weights = model.upstream_state_dict()
    pattern = (16, model.config.segment_lengths, model.config.dilation_rates)
    seen: list[torch.Tensor] = []

    def layers(*arguments: Any) -> list[torch.Tensor]:
        seen.extend(run(*arguments))
        return seen

    run = upstream.layers
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(upstream, "layers", layers)
        want = {"layers": torch.stack(upstream.slide_encoder(
            weights, x, coords, *pattern, grid=GRID, all_layers=True, global_pool=global_pool), 1)}  # fmt: skip
        got = slide_outputs(model, x, coords, OUTPUTS)

    def norm(y: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return F.layer_norm(y, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    last = norm(seen[-1], "encoder.layer_norm", 1e-5)
    want["class"], want["tiles"] = norm(last[:, 0], "norm", 1e-6), norm(last[:, 1:], "norm", 1e-6)
    want["mean"] = norm(last[:, 1:].mean(1), "norm", 1e-6)
    want["embedding"] = want["mean" if global_pool else "class"]
    assert set(got) == set(want) == set(OUTPUTS)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["embedding"], model(x, coords)[0], rtol=1e-9, atol=1e-9)
    assert list(slide_outputs(model, x, coords, ("tiles", "class"))) == ["tiles", "class"]


def test_outputs_that_there_are_not() -> None:
    model = encoder(1)
    x, coords = slides(5)
    for outputs in ((), ("patches",)):
        with pytest.raises(ValueError, match=r"expected some of \('embedding', "):
            slide_outputs(model, x, coords, outputs)
    with pytest.raises(ValueError, match="expected at least one tile"):
        slide_outputs(model, x[:, :0], coords[:, :0], ("mean",))
    with pytest.raises(ValueError, match="outside of the grid"):
        slide_outputs(model, x, coords - 1e6, ("tiles",))


def test_float16_coordinates_up_to_where_they_are_whole() -> None:
    model = encoder(1)
    x, _ = slides(6)
    coords = torch.tensor([[[0, 2048], [2047, 256], [255, 257], [1023, 511], [768, 3], [1, 1]]])
    torch.testing.assert_close(model(x, coords.half())[0], model(x, coords)[0], rtol=0, atol=0)
    absent = torch.tensor([[False] * 5 + [True]])
    far = coords.clone()
    far[0, 5, 0] = 5000
    with pytest.raises(TypeError, match="float16, which rounds pixels beyond 2,048: .*moves tiles"):
        model(x, far.half())
    torch.testing.assert_close(model(x, far.half(), padding_mask=absent)[0], model(x[:, :5], coords[:, :5])[0])
    for value in (torch.nan, torch.inf, -4096.0):
        far = coords.half()
        far[0, 0, 0] = value
        with pytest.raises(TypeError, match="float16"):
            model(x, far)
    with pytest.raises(TypeError, match="bfloat16, which rounds pixels beyond 256"):
        model(x, coords.bfloat16())


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None, "256"])
def test_a_tile_size_that_is_none(size: Any) -> None:
    model = encoder(1)
    with pytest.raises((TypeError, ValueError), match=f"tile_size={size!r}"):
        model.tile_size = size
    model.tile_size = 512.0  # type: ignore[assignment]
    assert model.tile_size == 512 and type(model.tile_size) is int
