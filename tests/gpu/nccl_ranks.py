"""Run by torchrun, see test_nccl.py: shards over NCCL against one device, on random cases that all ranks draw alike."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist

from longnet import dilated_attention

# (heads, kv heads, segment lengths, dilation rates, causal, padded, head offsets, tokens, and what is beyond the paper)
CASES = [
    (4, 4, (64, 256, 1024), (1, 4, 16), True, False, "interleaved", 1000),
    (4, 2, (64, 256, 1024), (1, 4, 16), False, True, "interleaved", 777),
    (6, 3, (50, 300, 2000), (1, 3, 7), True, True, "blocked", 1300),
    (3, 3, (128, 5000), (2, 9), False, False, "interleaved", 1501),
    (16, 16, (2048, 8192, 32768), (1, 4, 16), True, False, "interleaved", 32768),
    (4, 4, (), (), False, True, "interleaved", 999, {"window": 200}),
    (8, 4, None, 4, True, False, "grouped", 4000, {"window": 64, "dilated_queries": False, "dilation_block": 16}),
    (6, 3, (None, 300), (3, 7), False, True, "blocked", 1300, {"dilated_queries": False, "segment_offset": 11}),
    (4, 2, (64, 1000), (1, 4), True, True, "interleaved", 1500, {"window": 30, "segment_offset": (5, -400)}),
]


def run(tensors, case, dtype, group=None, mask=None):
    _, _, lengths, rates, is_causal, _, head_offsets, _, *beyond = case
    options = dict(*beyond)
    offset = options.pop("segment_offset", 0)
    *inputs, grad = (x.to(dtype) for x in tensors)
    query, key, value = (x.detach().requires_grad_() for x in inputs)

    def attend(rows, offset):
        return dilated_attention(
            query[rows], key[rows], value[rows], lengths, rates, is_causal=is_causal, head_offsets=head_offsets,
            key_padding_mask=None if mask is None else mask[rows], segment_offset=offset, return_lse=True, group=group,
            **options,
        )  # fmt: skip

    if group is None and isinstance(offset, tuple):
        alone = [attend(slice(row, row + 1), own) for row, own in enumerate(offset)]
        out, lse = (torch.cat(parts) for parts in zip(*alone, strict=True))
    else:
        out, lse = attend(slice(None), torch.tensor(offset) if isinstance(offset, tuple) else offset)
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        **dict(zip("qkv", torch.autograd.grad(out, (query, key, value), grad), strict=True)),
    }


def error(got, want):
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    got, want = got[finite].double(), want[finite].double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def check(case, seed, device):
    heads, kv_heads, _, _, _, padded, _, tokens, *_ = case
    generator = torch.Generator(device).manual_seed(seed)
    world, rank = dist.get_world_size(), dist.get_rank()
    shares = torch.rand(world, generator=torch.Generator().manual_seed(seed)) + 0.2
    bounds = (shares.cumsum(0) / shares.sum() * tokens).long().tolist()
    mine = slice(0 if rank == 0 else bounds[rank - 1], bounds[rank] if rank + 1 < world else tokens)
    draw = lambda count: torch.randn(2, count, tokens, 64, generator=generator, device=device, dtype=torch.float64)  # noqa: E731
    whole = [draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)]
    mask = torch.rand(2, tokens, generator=generator, device=device) < 0.2 if padded else None
    shard = [x[:, :, mine] for x in whole]
    own_mask = None if mask is None else mask[:, mine]
    group = dist.group.WORLD
    exact = run(whole, case, torch.float64, mask=mask)
    sharded = run(shard, case, torch.float64, group, own_mask)
    worst = {name: error(sharded[name], exact[name][:, :, mine]) for name in exact}
    assert max(worst.values()) < 1e-10, (case, worst)
    # Rounded: as close to the exact result as one device is, give or take a factor of two.
    alone, sharded = run(whole, case, torch.bfloat16, mask=mask), run(shard, case, torch.bfloat16, group, own_mask)
    for name in exact:
        part = exact[name][:, :, mine]
        assert error(sharded[name], part) <= 2 * error(alone[name][:, :, mine], part) + 1e-6, (case, name)


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    for seed, case in enumerate(CASES):
        check(case, seed, device)
    lengths = (64, 128) if dist.get_rank() == 0 else (64, 256)
    x = torch.randn(1, 2, 64, 64, device=device)
    with pytest.raises(ValueError, match="pattern is"):
        dilated_attention(x, x, x, lengths, (1, 2), group=dist.group.WORLD)
    sys.stdout.write(f"rank {dist.get_rank()}: {len(CASES)} cases agree\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
