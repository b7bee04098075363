"""Folders: run folders there and back, remote code for others, the model card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longnet_models import config, first, make, tokens
from transformers import AutoModelForCausalLM

import longnet
from longnet.hf import LongNetByteTokenizer, LongNetConfig, LongNetForCausalLM, save_remote_code
from longnet.training import load_model, save_model


def plain(**changes: Any) -> longnet.LongNetLM:
    torch.manual_seed(0)
    return longnet.LongNetLM(longnet.LongNetConfig.preset("nano", **changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "kv_heads": 2, "norm": "rms", "qk_norm": True}])
def test_a_plain_model_is_the_same_model_here(changes: dict[str, Any]) -> None:
    given, ids = plain(**changes), tokens()
    here = LongNetForCausalLM.from_longnet(given)
    assert torch.equal(first(here, input_ids=ids), given(ids).detach())
    back = here.to_longnet()
    assert torch.equal(back(ids), given(ids)) and not back.training
    assert {id(p) for p in back.parameters()} == {id(p) for p in given.parameters()}
    assert here.config.to_longnet().replace(kv_heads=None, ffn_dim=None) == given.config.replace(
        kv_heads=None, ffn_dim=None, loss_chunk=None
    )


@pytest.mark.parametrize("tied", [True, False])
def test_run_folders_there_and_back(tied: bool, tmp_path: Path) -> None:
    given, ids = plain(tie_embeddings=tied), tokens()
    save_model(given, tmp_path / "run")
    here = LongNetForCausalLM.from_run(tmp_path / "run")
    assert torch.equal(first(here, input_ids=ids), given(ids).detach()) and not here.training
    here.save_pretrained(tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(first(again, input_ids=ids), given(ids).detach())
    again.to_run(tmp_path / "back")
    assert torch.equal(load_model(tmp_path / "back")(ids), given(ids))
    with pytest.raises(ValueError, match="holds"):
        again.to_run(tmp_path / "back")


def test_bytes_alone_have_no_special_tokens(tmp_path: Path) -> None:
    assert LongNetForCausalLM.from_longnet(plain()).config.pad_token_id is None
    assert LongNetForCausalLM.from_longnet(plain(), pad_token_id=0).config.pad_token_id == 0


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model has type Linear: expected a longnet.LongNetLM"):
        LongNetForCausalLM.from_longnet(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    layered = plain().with_layer_types(("full_attention",))
    assert LongNetForCausalLM.from_longnet(layered).to_longnet().config.layer_types == layered.config.layer_types
    with pytest.raises(ValueError, match="expected the --out folder"):
        LongNetForCausalLM.from_run(tmp_path)
    other = plain()
    other.embedding_scale = 1.0
    with pytest.raises(ValueError, match="torchscale"):
        LongNetForCausalLM.from_longnet(other)


def published(folder: Path) -> Any:
    model = make(vocab_size=259, pad_token_id=256, bos_token_id=257, eos_token_id=258)
    model.save_pretrained(folder)
    LongNetByteTokenizer().save_pretrained(folder)
    assert save_remote_code(folder) == folder
    return model


@pytest.fixture
def run(forked_hf: tuple[list[str], Path], tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a program that has imported nothing of longnet, with an empty home of Hugging Face."""
    start, home = forked_hf

    def program(code: str) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(home)
        home.mkdir()
        paths = [path for path in sys.path if path]
        start_of_it = (
            f"import os, sys; sys.path[:0] = {paths!r}; sys.dont_write_bytecode = True\n"
            "import transformers.utils.hub as hub\n"
            f"assert hub.HF_MODULES_CACHE.startswith({str(home)!r}) and hub.is_offline_mode()\n"
            "assert not any(name.partition('.')[0] in ('longnet', 'LongNet') for name in sys.modules)\n"
        )
        (tmp_path / "program.py").write_text(start_of_it + code)
        environment = {
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [*start, str(tmp_path / "program.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return program


@pytest.mark.parametrize("order", [["tokenizer", "model"], ["model", "tokenizer"]])
def test_a_published_folder_loads_without_the_library_imported(order: list[str], tmp_path: Path, run: Any) -> None:
    model = published(tmp_path / "model")
    autos = {"tokenizer": "AutoTokenizer", "model": "AutoModelForCausalLM"}
    loads = "\n".join(f"{name} = {autos[name]}.from_pretrained(folder, trust_remote_code=True)" for name in order)
    code = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
folder = {str(tmp_path / "model")!r}
{loads}
assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
ids = tokenizer("seven", return_tensors="pt")["input_ids"]
torch.save(model(ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 8)
model.save_pretrained({str(tmp_path / "again")!r})
tokenizer.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r})
assert torch.equal(again(ids).logits, model(ids).logits)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([list(b"seven")])
    # Another process may have another number of threads, hence other sums.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), first(model, input_ids=ids))
    # Saved as any other model: no word of a file that is not there.
    assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "again").glob("*.json"))


def test_a_published_folder_says_what_is_missing(tmp_path: Path, run: Any) -> None:
    published(tmp_path / "model")
    code = f"""
sys.modules["longnet"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
"""
    done = run(code)
    assert done.returncode != 0 and "pip install '.[hf]'" in done.stderr


def test_the_model_card(tmp_path: Path) -> None:
    published(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for said in (
        "| 8 | 1 |\n| 32 | 2 |",
        "AutoModelForCausalLM",
        "pip install '.[hf]'",
        "| 2, 32, 4 (2) |",
    ):
        assert said in card
    (tmp_path / "README.md").write_text("mine")
    save_remote_code(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        save_remote_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type='llama': expected 'longnet'"):
        save_remote_code(tmp_path)


def test_a_config_there_and_back() -> None:
    given = config(use_xpos=False, use_rel_pos_bias=True, bias=False, head_offsets="blocked", feed_forward_chunk=7)
    assert LongNetConfig.from_longnet(
        given.to_longnet(), pad_token_id=0, bos_token_id=1, eos_token_id=2
    ).to_longnet() == (given.to_longnet())
