"""What is lent to other implementations does what the original does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import peers, stand_ins
from benchmarks.cases import Case, draw
from benchmarks.suites import speed


def test_rearrange_splits_permutes_and_merges():
    x = torch.arange(24).view(2, 12)
    assert torch.equal(stand_ins.rearrange(x, "b (n g) -> (b n) g", g=4), x.view(6, 4))
    assert torch.equal(
        stand_ins.rearrange(x, "b (n g) -> g (n b)", n=3), x.view(2, 3, 4).permute(2, 1, 0).reshape(4, 6)
    )
    assert torch.equal(stand_ins.rearrange(x, "a b -> b a 1"), x.T.unsqueeze(-1))
    assert torch.equal(stand_ins.rearrange(x.view(2, 12, 1), "a b 1 -> b a"), x.T)
    with pytest.raises(ValueError, match="cannot be split by 5"):
        stand_ins.rearrange(x, "b (n g) -> b n g", g=5)
    with pytest.raises(ValueError, match="not all known"):
        stand_ins.rearrange(x, "b (n g) -> b n g")
    with pytest.raises(ValueError, match="3 axes"):
        stand_ins.rearrange(x, "a b c -> a b c")


def test_kernels_that_are_lent_are_attention():
    query, key, value = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
    out, lse = stand_ins.torchscale_flash(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected)
    scores = (rows[0] @ rows[1].transpose(-1, -2) / 8**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    mask = stand_ins.LowerTriangularMask()
    torch.testing.assert_close(stand_ins.memory_efficient_attention(query, key, value, mask), expected)
    packed = torch.stack((query, key, value), 2).flatten(0, 1)
    starts = torch.tensor([0, 5, 10])
    out, packed_lse, _ = stand_ins.packed_flash(packed, starts, 5, 0.0, 8**-0.5, True, True)
    torch.testing.assert_close(out.unflatten(0, (2, 5)), expected)
    torch.testing.assert_close(packed_lse, lse)
    with pytest.raises(ValueError, match="one length"):
        stand_ins.packed_flash(packed, torch.tensor([0, 4, 10]), 6, 0.0, None, True, True)


def test_only_what_is_missing_is_lent_and_only_for_a_while(monkeypatch):
    monkeypatch.setattr(stand_ins, "missing", lambda: ("xformers",))
    before = set(sys.modules)
    with stand_ins.lent() as names:
        assert names == ("xformers",)
        assert importlib.import_module("xformers.ops").LowerTriangularMask is stand_ins.LowerTriangularMask
    assert set(sys.modules) == before


def test_peers_say_what_they_cannot_run():
    by_length = {case.length: case for case in speed.CELLS["cuda"] if case.head_dim == 64 and case.is_causal}
    assert peers._whole_segments(by_length[8192]) == "it needs lengths that every segment divides"
    assert peers._whole_segments(by_length[1048576]) is None
    for load in (peers.load_dilated_attention_pytorch, peers.load_alexisrozhkov):
        assert "no checkout given" in str(load(None).why_not)
        assert "its import needs" in str(load(Path("/nowhere")).why_not)


MODULE = """
import torch
from einops import rearrange

class MultiheadDilatedSelfAttention(torch.nn.Module):
    def __init__(self, ws, rs, embedding_dim, num_heads, flash):
        super().__init__()
        self.o_proj = torch.nn.Linear(embedding_dim, embedding_dim)

    def forward(self, x):
        from flash_attn.flash_attn_interface import flash_attn_unpadded_qkvpacked_func
        return self.o_proj(rearrange(x, "b n c -> b n c"))
"""


def test_a_causal_peer_is_loaded_and_says_where_it_ends(tmp_path):
    package = tmp_path / "dilated_self_attention"
    package.mkdir()
    (package / "multihead_dilated_self_attention.py").write_text(MODULE)
    try:
        peer = peers.load_alexisrozhkov(tmp_path)
        assert peer.make is not None, peer.why_not
        case = Case(64, "float32", heads=2, head_dim=8, segment_lengths=(16, 32), dilation_rates=(1, 2))
        passes = peer.make(case, draw(case).rows()).passes
        assert [x.shape for x in passes["forward"]()] == [(1, 64, 16)]
        assert [x.shape for x in passes["forward_backward"]()] == [(1, 64, 16)] * 2
        long = {(c.length, c.is_causal): peer.refuses(c) for c in speed.CELLS["cuda"] if c.head_dim == 64}
        assert long[131072, True] is None
        assert long[131072, False] == "it is causal only"
        assert "gather indices alone take 248 GiB" in str(long[1048576, True])
    finally:
        for name in [name for name in sys.modules if name.startswith("dilated_self_attention")]:
            del sys.modules[name]
