"""Rows between ranks: packed by a plan, sent in one collective call, received while something else is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet.attention.sharding.plan import ShardPlan


@dataclass
class Transfer:
    """A collective call under way; ``wait`` before the rows are used."""

    rows: Tensor
    _work: Any
    _sent: Tensor

    def wait(self) -> Tensor:
        self._work.wait()
        return self.rows


def pack(plan: ShardPlan, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
    """The rows that others need, (rows, B, channels): keys, values, and with a mask one channel that is 1 for padding."""
    chosen = [x[:, plan.send_heads, plan.send_tokens] for x in (key, value)]
    if padding is not None:
        chosen.append(padding[:, plan.send_tokens].to(key.dtype).unsqueeze(-1))
    return torch.cat(chosen, -1).transpose(0, 1).contiguous()


def send(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup) -> Transfer:
    """Start sending rows (n, ...), ``sent[i]`` of them to rank ``i`` in order; ``received[i]`` come from it."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    # As bytes: not every library of collectives knows every floating type.
    size = rows[:1].numel() * rows.element_size() if len(rows) else out[:1].numel() * out.element_size()
    target, source = (x.view(-1).view(torch.uint8) for x in (out, rows))
    work = dist.all_to_all_single(
        target, source, [n * size for n in received], [n * size for n in sent], group=group, async_op=True
    )
    return Transfer(out, work, rows)
