"""Trains a small LongNet on as many ranks as torchrun started, over gloo: ``train_on_ranks.py ddp|fsdp2 FOLDER``.

``ddp`` is Trainer's; its FSDP needs GPUs, so ``fsdp2`` shards by torch what Trainer would: ``_no_split_modules`` and the root.
The folder gets ``losses.json`` (of rank 0's rows) and the model. Imported, ``train`` does the same in one process.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from longnet_models import QUICK, make, tokens
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

STEPS, BATCH = 4, 4


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.ids = tokens(STEPS * BATCH, 24)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[place], "labels": self.ids[place]}


def trainer(folder: Path, batch: int, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        **QUICK,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-2,
        "seed": 5,
        **options,
    }
    return Trainer(make(), TrainingArguments(**given), train_dataset=Rows())


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def train(model: Any, rank: int = 0, ranks: int = 1) -> list[float]:
    """Losses of plain steps on this rank's rows of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for batch in Rows().ids.split(BATCH):
        own = batch[rank::ranks]
        loss = model(own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main(mode: str, folder: Path) -> None:
    if mode == "ddp":
        run = trainer(folder, BATCH // 2, ddp_backend="gloo", ddp_find_unused_parameters=False)
        run.train()
        assert isinstance(run.model_wrapped, DistributedDataParallel) and run.args.world_size == 2
        rank, found, weights = run.args.process_index, losses(run), run.model.state_dict()
        # DDP holds the group. Were it the last to do so, gloo's threads would be joined under Python's lock, which one of
        # them may be waiting for: the process would hang, once in ten runs on a busy machine.
        del run
        gc.collect()
    else:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model = make().train()
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
        assert isinstance(model, FSDPModule) and ranks == 2
        found = train(model, rank, ranks)
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        make().save_pretrained(folder, state_dict=weights)
        (folder / "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
