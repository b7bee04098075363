"""The public names of ``longnet.hf`` and their signatures, exactly: a change here is a change for users."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

hf = pytest.importorskip("longnet.hf", reason="transformers is not installed")

NAMES = [
    *("BoundedCache", "LongNetByteTokenizer", "LongNetCache", "LongNetConfig", "LongNetForCausalLM"),
    *("LongNetForMaskedLM", "LongNetForSequenceClassification", "LongNetModel"),
    *("apply", "from_run", "load", "restore", "save_remote_code"),
]

SIGNATURES = {
    "apply": "(model, segment_lengths=None, dilation_rates=None, *, layers=None, layer_types=None, sliding_window=None, "
    "stride=4, stride_block=1, head_offsets='interleaved', backend='auto')",
    "restore": "(model)",
    "from_run": "(folder)",
    "load": "(folder, model_class=None, **options)",
    "save_remote_code": "(folder)",
    "BoundedCache": "(model)",
    "LongNetCache": "(max_length=None, *, rewindable=False)",
    "LongNetForCausalLM.from_longnet": "(model, **more)",
    "LongNetForCausalLM.from_run": "(folder, **more)",
    "LongNetForCausalLM.to_run": "(self, folder)",
    "LongNetForCausalLM.to_longnet": "(self)",
}

# The config's own fields and their defaults, without those that it has from transformers.
FIELDS = {
    "vocab_size": 259,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "segment_lengths": (2048, 4096, 8192, 16384, 32768),
    "dilation_rates": (1, 2, 4, 6, 12),
    "is_causal": True,
    "norm": "layer",
    "qk_norm": False,
    "bias": True,
    "dropout": 0.0,
    "use_xpos": True,
    "use_rel_pos_bias": False,
    "head_offsets": "interleaved",
    "xpos_scale_base": None,
    "head_numbers": None,
    "feed_forward_chunk": None,
    "backend": "auto",
    "layer_types": None,
    "sliding_window": None,
    "stride": 4,
    "stride_block": 1,
    "shift_keys": False,
    "far_positions": True,
    "use_cache": True,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "tie_word_embeddings": True,
}


def test_the_public_names() -> None:
    assert hf.__all__ == NAMES
    assert [name for name in NAMES if not hasattr(hf, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_of(name: str) -> None:
    found: Callable[..., Any] = hf
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == SIGNATURES[name]


def test_the_fields_of_the_config() -> None:
    parameters = inspect.signature(hf.LongNetConfig).parameters
    assert {name: parameters[name].default for name in FIELDS} == FIELDS
    assert list(vars(hf.LongNetConfig)["__annotations__"]) == list(FIELDS)


def test_the_names_a_checkpoint_holds() -> None:
    config = hf.LongNetConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, segment_lengths=4, dilation_rates=1
    )
    assert config.model_type == "longnet"
    model = hf.LongNetForCausalLM(config)
    plain = [f"model.stack.{name}" for name in model.to_longnet().state_dict()]
    assert list(model.state_dict()) == [*plain, "lm_head.weight"]


def test_without_the_extra_the_import_says_what_to_install() -> None:
    # None in sys.modules blocks an import.
    code = "import sys; sys.modules['transformers'] = None; import longnet.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "longnet.hf needs transformers, which is not installed: pip install '.[hf]'" in done.stderr.splitlines()[-1]
