"""CUDA graphs of the encoder, one for each size of slide: at short slides it is limited by launch overhead.

Torch's own graphs of compiled functions (``mode="reduce-overhead"``) hand out gradients that lie in a graph's memory, where the
next replay overwrites them: gradients of several slides do not add up. Here all that leaves a graph is copied.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longnet.runtime.autocast import autocast_dtype
from longnet.runtime.torch_internals import copy_many, parameter_table

# How many graphs a model keeps: those of the sizes that came last.
_MOST = 8
# Calls before a capture: what is made or compiled once is made then.
_WARM_CALLS = 3

Run = Callable[[Tensor], list[Tensor]]


class Replays:
    """The captured passes of models, which it does not keep alive."""

    def __init__(self) -> None:
        self._by_model: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Captured]]
        self._by_model = weakref.WeakKeyDictionary()

    def run(self, model: nn.Module, settings: Hashable, function: Run, x: Tensor) -> list[Tensor]:
        """``function(x)`` by a graph, captured when it is first asked for.

        Args:
            settings: all that the function depends on besides x and the model's parameters.
        """
        parameters = list(model.parameters())
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype("cuda"))
        where = tuple((one.data_ptr(), one.requires_grad) for one in parameters)
        key = (settings, mode, x.shape, x.dtype, x.device, x.requires_grad, where)
        known = self._by_model.setdefault(model, OrderedDict())
        captured = known.get(key)
        if captured is None:
            with torch.cuda.device(x.device), _stand_ins(model):
                captured = known[key] = Captured(function, x, list(model.parameters()))
            if len(known) > _MOST:
                known.popitem(last=False)
        known.move_to_end(key)
        # The graph's memory still holds what the backward pass of the slide before needs.
        return function(x) if captured.waiting else captured(x, parameters)

    def forget(self, model: nn.Module) -> None:
        """Give back the memory of a model's graphs."""
        self._by_model.pop(model, None)


class _Turn:
    """A forward pass whose backward pass has not been."""


class Captured:
    """``function(x)`` for x of one shape, and its gradients where some are needed."""

    def __init__(self, function: Run, x: Tensor, parameters: Sequence[Tensor]) -> None:
        """Run and capture it; the parameters have no part in any other pass, see :func:`_stand_ins`."""
        # It holds tensors that the graph reads.
        self._function = function
        self._x = x.detach().clone().requires_grad_(x.requires_grad and torch.is_grad_enabled())
        inputs = (self._x, *parameters)
        differentiated = [one for one in inputs if one.requires_grad] if torch.is_grad_enabled() else []
        self._differentiates = bool(differentiated)
        self._turn: weakref.ref[_Turn] | None = None
        current, side = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_CALLS):
                outs = function(self._x)
                if differentiated:
                    _gradients(outs, differentiated, [torch.zeros_like(out) for out in outs])
                del outs
        current.wait_stream(side)
        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            outs = function(self._x)
        self._outs = [out.detach() for out in outs]
        # Results that depend on nothing whose gradient is needed.
        self._without = [place for place, out in enumerate(outs) if not out.requires_grad]
        if not differentiated:
            return
        self._upstream = [torch.zeros_like(out) for out in self._outs]
        self._backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            grads = _gradients(outs, differentiated, self._upstream)
        self._grads = [grad.detach() for grad in grads if grad is not None]
        given = iter(range(len(self._grads)))
        places = iter([None if grad is None else next(given) for grad in grads])
        # By input: which gradient is its own, None where it has none.
        self._places = [next(places) if one.requires_grad else None for one in inputs]

    @property
    def waiting(self) -> bool:
        """Whether a backward pass may still come."""
        return self._turn is not None and self._turn() is not None

    def __call__(self, x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        if not self._differentiates:
            return self.replay(x)
        return list(_Replay.apply(self, x, *parameters))

    def replay(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            self._x.copy_(x)
            self._forward.replay()
            return [out.clone() for out in self._outs]

    def constant(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the results that have no gradient."""
        return [outs[place] for place in self._without]

    def begin(self) -> _Turn:
        turn = _Turn()
        self._turn = weakref.ref(turn)
        return turn

    def replay_backward(self, upstream: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients by input, in memory of their own."""
        for place, grad in zip(self._upstream, upstream, strict=True):
            place.copy_(grad)
        self._backward.replay()
        self._turn = None
        grads = _copies(self._grads)
        return tuple(None if place is None else grads[place] for place in self._places)


class _Replay(torch.autograd.Function):
    """A captured pass as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.captured, ctx.turn = captured, captured.begin()
        outs = captured.replay(x)
        ctx.mark_non_differentiable(*captured.constant(outs))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn is None:
            raise RuntimeError(
                "a slide's captured backward pass ran twice: its memory is used again within the first; expected one backward "
                "pass for each forward pass, or cuda_graphs=False"
            )
        ctx.turn = None
        return (None, *ctx.captured.replay_backward(upstream))


def _gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    pairs = [(out, grad) for out, grad in zip(outs, upstream, strict=True) if out.requires_grad]
    # As in a backward pass after the forward pass's autocast.
    with torch.autocast("cuda", enabled=False):
        return torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """The model with parameters of the same memory that no pass has seen.

    Where a parameter's gradient is added up, on which stream, is decided by the first pass that is not over yet. A backward pass
    that is captured must not meet such a place of another stream: the capture would break.
    """
    others: dict[nn.Parameter, nn.Parameter] = {}
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, own in parameter_table(module).items():
            if own is not None:
                swapped.append((module, name, own))
                if own not in others:
                    others[own] = nn.Parameter(own.detach(), requires_grad=own.requires_grad)
    try:
        for module, name, own in swapped:
            parameter_table(module)[name] = others[own]
        yield
    finally:
        for module, name, own in swapped:
            parameter_table(module)[name] = own


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, those of one dtype made by one launch into one block of memory."""
    copies: list[Tensor] = list(tensors)
    for dtype in {one.dtype for one in tensors}:
        places = [place for place, one in enumerate(tensors) if one.dtype == dtype]
        same = [tensors[place] for place in places]
        block = same[0].new_empty(sum(one.numel() for one in same))
        parts = [part.view(one.shape) for part, one in zip(block.split([x.numel() for x in same]), same, strict=True)]
        copy_many(parts, same)
        for place, part in zip(places, parts, strict=True):
            copies[place] = part
    return copies
