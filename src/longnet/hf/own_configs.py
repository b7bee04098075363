"""Configs of a dilated model's own: what shared them, around it or beside it, keeps its attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

_ATTRIBUTE = "longnet_own_configs"


@dataclass(frozen=True)
class OwnConfig:
    """A dilated model's copy ``own`` of the config ``shared``, which was ``before`` when it was copied."""

    own: PretrainedConfig
    shared: PretrainedConfig
    before: PretrainedConfig


def own_configs(model: nn.Module) -> list[OwnConfig]:
    """All of one model; none for a model that has no config of its own."""
    found: list[OwnConfig] = getattr(model, _ATTRIBUTE, [])
    return found


def give_own_configs(model: nn.Module) -> None:
    """Let all modules of the model refer to copies of their configs, the same copy where they shared one."""
    memo: dict[int, object] = {}
    configs: dict[int, OwnConfig] = {}
    for module in model.modules():
        for name, shared in vars(module).items():
            if isinstance(shared, PretrainedConfig):
                own = copy.deepcopy(shared, memo)
                configs[id(own)] = OwnConfig(own, shared, copy.deepcopy(shared))
                vars(module)[name] = own
    setattr(model, _ATTRIBUTE, list(configs.values()))


def put_back_configs(model: nn.Module) -> None:
    """Undo :func:`give_own_configs`; what was changed in a copy is changed in the shared config too."""
    configs = {id(config.own): config for config in own_configs(model)}
    delattr(model, _ATTRIBUTE)
    for module in model.modules():
        for name, own in vars(module).items():
            if id(own) in configs:
                vars(module)[name] = configs[id(own)].shared
    for config in configs.values():
        _carry(config.own, config.shared, config.before)


def _carry(own: PretrainedConfig, shared: PretrainedConfig, before: PretrainedConfig) -> None:
    for name, value in vars(own).items():
        old = vars(before).get(name)
        if isinstance(value, PretrainedConfig) and isinstance(old, PretrainedConfig):
            _carry(value, vars(shared)[name], old)
        elif name not in vars(before) or value != old:
            vars(shared)[name] = value
