"""Folders that others can load: with code that finds this library or says how to get it, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longnet.geometry import Pattern
from longnet.hf.configuration import LongNetConfig

_MODULE = "modeling_longnet"
_INSTALL = "pip install '.[hf]'  # in a checkout of longnet"
_MODELS = {
    "AutoModel": "LongNetModel",
    "AutoModelForCausalLM": "LongNetForCausalLM",
    "AutoModelForMaskedLM": "LongNetForMaskedLM",
    "AutoModelForSequenceClassification": "LongNetForSequenceClassification",
}
_PIPELINES = {
    "LongNetForCausalLM": "text-generation",
    "LongNetForMaskedLM": "fill-mask",
    "LongNetForSequenceClassification": "text-classification",
    "LongNetModel": "feature-extraction",
}
_TOKENIZER = "LongNetByteTokenizer"
_NAMES = (_TOKENIZER, "LongNetConfig", *sorted(_MODELS.values()))
_CODE = f'''"""LongNet for transformers: this file finds the library that computes it."""

try:
    from longnet.hf import {", ".join(_NAMES)}
except ImportError as error:
    raise ImportError("this model is a LongNet: {_INSTALL}") from error
'''


def save_remote_code(folder: str | Path) -> Path:
    """Make a folder of ``save_pretrained`` ready for ``push_to_hub`` or ``upload_folder``: anyone can load it.

    It gets ``modeling_longnet.py`` and an ``auto_map``, so that Auto classes load it with ``trust_remote_code=True`` and without
    ``import longnet.hf`` (the file says how to install the library where it is missing), and ``README.md``, a model card,
    unless there is one. A tokenizer saved there is mapped too. What is loaded from there is saved as any other model is:
    call this again to publish it.

    Args:
        folder: holds ``config.json`` of a LongNet.

    Returns:
        The folder.

    Raises:
        ValueError: no config there, or one of another model.
    """
    path = Path(folder)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{str(path)!r} holds no config.json: expected a folder that save_pretrained wrote")
    config = _read(config_file)
    if config.get("model_type") != LongNetConfig.model_type:
        raise ValueError(
            f"{str(config_file)!r} is of model_type={config.get('model_type')!r}: expected {LongNetConfig.model_type!r}"
        )
    (path / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
    mapped = {"AutoConfig": "LongNetConfig", **_MODELS}
    _write(config_file, {**config, "auto_map": {auto: f"{_MODULE}.{name}" for auto, name in mapped.items()}})
    tokenizer_file = path / "tokenizer_config.json"
    if tokenizer_file.is_file() and (tokenizer := _read(tokenizer_file)).get("tokenizer_class") == _TOKENIZER:
        _write(tokenizer_file, {**tokenizer, "auto_map": {"AutoTokenizer": [f"{_MODULE}.{_TOKENIZER}", None]}})
    card = path / "README.md"
    if not card.exists():
        card.write_text(_card(LongNetConfig.from_dict(config), path), encoding="utf-8")
    return path


def _card(config: LongNetConfig, path: Path) -> str:
    architecture = (config.architectures or ["LongNetModel"])[0]
    pattern = Pattern.parse(config.segment_lengths, config.dilation_rates)
    auto = next((auto for auto, name in _MODELS.items() if name == architecture), "AutoModel")
    branches = "\n".join(f"| {branch.segment_length:,} | {branch.dilation_rate} |" for branch in pattern.branches)
    kind = "decoder" if config.is_causal else "encoder"
    shape = (
        f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} ({config.num_key_value_heads})"
    )
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return f"""---
library_name: transformers
pipeline_tag: {_PIPELINES.get(architecture, "feature-extraction")}
tags:
- longnet
- dilated-attention
- custom_code
---

# LongNet {kind}

A `{architecture}` of [LongNet](https://arxiv.org/abs/2307.02486): dilated attention, whose cost grows with the length of the
input and not with its square.

| | |
|---|---|
| layers, width, heads (key/value) | {shape} |
| vocabulary | {config.vocab_size:,} |
| weights | {size:,} bytes of safetensors |

| segment length | dilation rate |
|---|---|
{branches}

## Use

```sh
{_INSTALL}
```

```python
import longnet.hf  # registers the model; or pass trust_remote_code=True
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("this repository")
model = {auto}.from_pretrained("this repository")
```

What it was trained on, how well it does and what it must not be used for is for its author to say here.
"""


def _read(file: Path) -> dict[str, Any]:
    read = json.loads(file.read_text("utf-8"))
    assert isinstance(read, dict)
    return read


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
