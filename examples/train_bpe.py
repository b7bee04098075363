"""A tokenizer and a language model from text, by the commands: what a person does in a week, in one script.

    python examples/train_bpe.py --data my/texts --out runs/bpe --vocab 32768 --steps 20000 --preset base --context 8192

Trains a byte-level BPE and a model on it, kills the run with SIGKILL half-way and resumes it, generates, writes the report,
exports to Hugging Face, reads that with AutoModelForCausalLM, and trains on at four times the context.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longnet.hf import LongNetForCausalLM


def longnet(*arguments: object) -> str:
    """Run a command to its end; its standard output."""
    command = [sys.executable, "-m", "longnet", *map(str, arguments)]
    print("+ longnet", *map(str, arguments), flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def steps_of(run: Path) -> int:
    """The last step in a run's metrics."""
    file = run / "metrics.jsonl"
    # The last line may not be written to its end.
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def train_and_kill(run: Path, step: int, *arguments: object) -> int:
    """Start a run, kill it after ``step`` steps, and return the last step in its metrics."""
    command = [sys.executable, "-m", "longnet", "train", "--out", str(run), *map(str, arguments)]
    print("+ longnet", *command[3:], f"    (killed after step {step})", flush=True)
    process = subprocess.Popen(command)
    while process.poll() is None and steps_of(run) < step:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_of(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="text, JSON lines, Parquet or a saved data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2000, help="of each of the two runs")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    out, run, longer, exported = (options.out / name for name in ("", "run", "longer", "hugging-face"))
    tokenizer, prompt = out / "tokenizer", "The "
    shared = ["--steps", options.steps, "--device", options.device, "--optimizer", "muon", "--lr", 3e-3]

    longnet("tokenizer", "train", "--data", options.data, "--vocab", options.vocab, "--out", tokenizer)
    given = ["--data", options.data, "--tokenizer", tokenizer, "--preset", options.preset, "--context", options.context]
    saves = ["--save-every", max(1, options.steps // 10), "--batch", options.batch]
    done = train_and_kill(run, options.steps // 2, *given, *saves, *shared)
    print(f"killed after step {done}")
    longnet("train", "--out", run, "--resume")
    text = longnet("generate", run, "--prompt", prompt, "--tokens", 32, "--temperature", 0, "--device", options.device)
    print(text)

    LongNetForCausalLM.from_run(run).save_pretrained(exported)
    AutoTokenizer.from_pretrained(run).save_pretrained(exported)
    model, reader = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = reader(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=32, do_sample=False)
    print(reader.decode(found[0]))

    more = ["--context", 4 * options.context, "--batch", max(1, options.batch // 4)]
    longnet("train", "--out", longer, "--data", options.data, "--init-from", exported, *more, *shared)
    before, after = (
        json.loads((one / "evaluation.json").read_text())["bits_per_byte"]["mean"] for one in (run, longer)
    )
    print(f"{before:.3f} bits per held-out byte, {after:.3f} after training on at a context of {4 * options.context:,}")


if __name__ == "__main__":
    main()
