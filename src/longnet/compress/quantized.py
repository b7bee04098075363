"""Quantised weights: torchao's schemes, the layers they apply to, and the plain tensors of a saved weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longnet.models.placement import device_of
from longnet.runtime.torch_internals import int8_matmul

# int8 weights; int8 weights and activations, a scale a token; 8-bit floats (e4m3). One scale an output channel.
SCHEMES = ("int8wo", "int8dyn", "float8wo")

_HEADS = ("head", "lm_head")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(model: nn.Module, scheme: str, *, head: bool = False) -> None:
    """Quantise the weights of the model's linear layers, in place, with torchao.

    Embeddings, norms and the output head are not quantised: together they are a small part of a large model, and the most
    sensitive. Each linear weight becomes one byte per element and one scale per output channel. Biases stay.

    Args:
        model: any module with ``nn.Linear`` layers of float32, bfloat16 or float16; for example a LongNetLM, pruned or not.
        scheme: ``"int8wo"`` (int8 weights, activations unchanged), ``"int8dyn"`` (activations too, rounded to int8 with
            a scale per token) or ``"float8wo"`` (weights as float8 e4m3). ``"int8dyn"`` needs a GPU, or a CPU whose int8 product
            is exact.
        head: quantise the output head too (a linear layer called ``head`` or ``lm_head``), unless it is tied to the embedding.

    Raises:
        TypeError: not a module. ValueError: an unknown scheme, no layer to quantise, weights of another dtype or already
            quantised, no head of its own with ``head=True``. ModuleNotFoundError: torchao is missing.
    """
    chosen = _layers(model, scheme, head)
    torchao = _torchao()
    torchao.quantize_(model, _config(scheme, model), lambda module, _: id(module) in chosen)


def quantization(model: nn.Module) -> str | None:
    """The scheme of the model's quantised weights, None when there are none.

    Raises:
        ValueError: quantised in another way than :func:`quantize` does, or in several.
    """
    schemes = {scheme for module in model.modules() if (scheme := _scheme_of(module)) is not None}
    if len(schemes) > 1 or not schemes <= set(SCHEMES):
        raise ValueError(f"the model's weights are {sorted(schemes)}: expected one of {SCHEMES}")
    return schemes.pop() if schemes else None


def prepare_qat(model: nn.Module, scheme: str, *, head: bool = False) -> None:
    """Let the layers that :func:`quantize` would quantise round in training as quantised ones, in place, with torchao.

    Weights keep their dtype, and gradients pass straight through the rounding. Train, then call :func:`convert_qat`.

    Args, raises: as :func:`quantize`.
    """
    chosen = _layers(model, scheme, head)
    torchao = _torchao()
    qat = torchao.qat
    weight: Any
    if scheme == "float8wo":
        weight = qat.Float8FakeQuantizeConfig(torch.float8_e4m3fn, torchao.PerRow())
    else:
        weight = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    config = qat.QATConfig(weight_config=weight, step="prepare")
    torchao.quantize_(model, config, lambda module, _: id(module) in chosen)
    if scheme == "int8dyn":
        for module in model.modules():
            if isinstance(module, qat.linear.FakeQuantizedLinear):
                module.activation_fake_quantizer = _RoundedTokens()


def convert_qat(model: nn.Module, scheme: str) -> None:
    """Quantise the layers that :func:`prepare_qat` prepared, in place.

    Args:
        scheme: the one it was prepared for.

    Raises:
        TypeError: not a module. ValueError: an unknown scheme, or a model that was not prepared.
    """
    _check(model, scheme)
    torchao = _torchao()
    qat = torchao.qat
    prepared = {id(module) for module in model.modules() if isinstance(module, qat.linear.FakeQuantizedLinear)}
    if not prepared:
        raise ValueError("model has no layer that prepare_qat prepared: expected prepare_qat first, or quantize")
    config = qat.QATConfig(_config(scheme, model), step="convert")
    torchao.quantize_(model, config, lambda module, _: id(module) in prepared)


class _RoundedTokens(nn.Module):
    """Activations rounded as ``"int8dyn"`` rounds them; torchao has no symmetric fake rounding per token."""

    def forward(self, x: Tensor) -> Tensor:
        torchao = _torchao()
        rounded = torchao.Int8Tensor.from_hp(x.detach(), torchao.PerRow()).dequantize()
        return x + (rounded - x).detach()


def plain_tensors(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor itself, or the plain tensors of a quantised one, as ``name.part``."""
    if not _of_torchao(weight):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield f"{name}.{part}", getattr(weight, part)


def _of_torchao(weight: Any) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def _scheme_of(module: nn.Module) -> str | None:
    """The scheme of a module's weight, or the name of another kind of quantisation; None for a plain weight."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and _of_torchao(weight):
        kind, dynamic = type(weight).__name__, getattr(weight, "act_quant_kwargs", None) is not None
        names = {("Int8Tensor", False): "int8wo", ("Int8Tensor", True): "int8dyn", ("Float8Tensor", False): "float8wo"}
        return names.get((kind, dynamic), kind)
    # Modules of torch.ao.nn.quantized pack their weights.
    return f"{type(module).__module__}.{type(module).__name__}" if callable(weight) else None


def _check(model: nn.Module, scheme: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has type {type(model).__name__}: expected an nn.Module")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown: expected one of {SCHEMES}")


def _layers(model: nn.Module, scheme: str, head: bool) -> set[int]:
    """The ids of the linear layers to quantise."""
    _check(model, scheme)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = [name for name in linear if name.rpartition(".")[2] in _HEADS]
    if head and not heads:
        raise ValueError(
            "head=True: the model has no output head of its own (it is the embedding table); expected head=False"
        )
    chosen = {name: module for name, module in linear.items() if head or name not in heads}
    if not chosen:
        raise ValueError("model has no nn.Linear layer to quantise")
    for name, module in chosen.items():
        if type(module) is not nn.Linear or _of_torchao(module.weight):
            kind = type(module.weight if _of_torchao(module.weight) else module).__name__
            raise ValueError(f"{name} is {kind} already: expected a model that is neither quantised nor prepared")
        if module.weight.dtype not in _DTYPES:
            raise ValueError(
                f"{name}.weight has dtype {module.weight.dtype}: expected one of {', '.join(map(str, _DTYPES))}"
            )
    return {id(module) for module in chosen.values()}


@cache
def exact_int8_product() -> bool:
    """Whether the CPU's int8 matrix product is exact: without VNNI, sums of two products saturate at 16 bits."""
    one = torch.full((32, 32), 127, dtype=torch.int8)
    return bool((int8_matmul(one, one) == 32 * 127**2).all())


def _config(scheme: str, model: nn.Module) -> Any:
    """torchao's config of a scheme. It does not change torchao's inductor settings, which are global.

    Raises:
        ValueError: ``"int8dyn"`` on a CPU whose int8 product saturates.
    """
    torchao = _torchao()
    if scheme == "int8dyn" and device_of(model).type == "cpu" and not exact_int8_product():
        raise ValueError(
            "scheme='int8dyn': the int8 matrix product of this CPU saturates (it has no VNNI), so results would be wrong: "
            "expected 'int8wo', or a model on a GPU"
        )
    configs = {
        "int8wo": torchao.Int8WeightOnlyConfig,
        "int8dyn": torchao.Int8DynamicActivationInt8WeightConfig,
        "float8wo": torchao.Float8WeightOnlyConfig,
    }
    return configs[scheme](set_inductor_config=False)


def _torchao() -> Any:
    try:
        import torchao.quantization.qat  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"quantisation needs {error.name}, which is not installed. In a checkout of longnet: pip install '.[quant]'",
            name=error.name,
        ) from None
    return torchao.quantization
