"""What bad input gets: an error that names the argument, the value it had and what was expected."""

from __future__ import annotations

import pytest
import torch

from longnet import DilatedAttention, dilated_attention

Q = torch.randn(2, 4, 16, 8)
MASK = torch.zeros(2, 16, dtype=torch.bool)


def call(query=Q, key=Q, value=Q, segment_lengths=(4, 8), dilation_rates=(1, 2), **options):
    return dilated_attention(query, key, value, segment_lengths, dilation_rates, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(segment_lengths=(2048, 4096), dilation_rates=(1,)), ValueError, r"and dilation_rates=\(1,\) differ in length"),
        (dict(segment_lengths=(), dilation_rates=()), ValueError, "empty"),
        (dict(segment_lengths=(0, 8)), ValueError, r"segment_lengths=\(0, 8\) holds 0.*at least 1"),
        (dict(dilation_rates=(1, -2)), ValueError, r"dilation_rates=\(1, -2\) holds -2"),
        (dict(dilation_rates=(5, 2)), ValueError, r"holds 5, more than its segment length 4"),
        (dict(segment_lengths=(4, 2**62)), ValueError, "segment_lengths=.*holds 4611686018427387904: .* at most 1099511627776"),
        (dict(segment_lengths=(4.0, 8)), TypeError, "segment_lengths.*4.0 of type float"),
        (dict(segment_lengths="48"), TypeError, "segment_lengths='48' has type str: expected an int or"),
        (dict(dilation_rates=(True, 2)), TypeError, "dilation_rates.*True of type bool"),
        (dict(segment_lengths=None), ValueError, r"segment_lengths=\(None,\) and .* differ in length"),
        (dict(segment_lengths=8.0), TypeError, "segment_lengths=8.0 has type float"),
        (dict(window=0), ValueError, "window=0: expected at least 1"),
        (dict(window=1 << 41), ValueError, "window=2199023255552: expected at most 1099511627776"),
        (dict(dilation_block=10**20), ValueError, "dilation_block=100000000000000000000: expected at most 1099511627776"),
        (dict(dilation_rates=(1, 4), dilation_block=1 << 39), ValueError, "dilation_block=549755813888 times a rate of 4"),
        (dict(segment_offset=[1, 2]), TypeError, r"segment_offset=\[1, 2\] has type list: expected an int, or an int64 tensor"),
        (dict(window=True), TypeError, "window=True has type bool"),
        (dict(window=8.0), TypeError, "window=8.0 has type float"),
        (dict(dilation_block=0), ValueError, "dilation_block=0: expected at least 1"),
        (dict(dilation_block=None), TypeError, "dilation_block=None"),
        (dict(dilated_queries=0), TypeError, "dilated_queries=0 has type int"),
        (dict(segment_offset=True), TypeError, "segment_offset=True has type bool"),
        (dict(segment_offset=1.0), TypeError, "segment_offset=1.0 has type float"),
        (dict(segment_offset=1 << 41), ValueError, "segment_offset=2199023255552: expected at most 1099511627776"),
        (dict(segment_offset=torch.zeros(2, dtype=torch.int32)), TypeError, "segment_offset has dtype torch.int32: expected"),
        (dict(segment_offset=torch.zeros(3, dtype=torch.int64)), ValueError, r"\(3,\): expected \(B,\) = \(2,\), or an int"),
        (dict(segment_offset=torch.zeros((), dtype=torch.int64)), ValueError, r"segment_offset has shape \(\)"),
        (dict(segment_offset=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "segment_offset is on meta"),
        (dict(head_offsets="diagonal"), ValueError, "head_offsets='diagonal' is unknown.*interleaved.*blocked"),
        (dict(query=Q[0]), ValueError, r"query has shape \(4, 16, 8\): expected 4 dimensions"),
        (dict(key=Q.double()), ValueError, "key has dtype torch.float64: expected the query's torch.float32"),
        (dict(value=Q.to("meta")), ValueError, "value is on meta: expected the query's device cpu"),
        (dict(key=Q[:, :, :8], value=Q[:, :, :8]), ValueError, "key has shape .*expected"),
        (dict(value=Q[..., :4]), ValueError, "value has shape"),
        (dict(value=Q[:, :2]), ValueError, "value has 2 heads: expected as many as key, 4"),
        (dict(key=Q[:, :3], value=Q[:, :3]), ValueError, "query has 4 heads and key has 3: expected a multiple"),
        (dict(query=Q.long()), TypeError, "query has dtype torch.int64"),
        (dict(key=Q.to_sparse()), TypeError, r"key has the layout torch.sparse_coo: expected torch.strided"),
        (dict(key_padding_mask=MASK.to_sparse()), TypeError, "key_padding_mask has the layout torch.sparse_coo"),
        (dict(query=[1.0]), TypeError, "query has type list"),
        (dict(key_padding_mask=MASK[:, :15]), ValueError, r"\(2, 15\): expected \(B, N\) = \(2, 16\)"),
        (dict(key_padding_mask=torch.zeros(2, 16)), TypeError, "key_padding_mask has dtype torch.float32: expected torch.bool"),
        (dict(key_padding_mask=MASK.to("meta")), ValueError, "key_padding_mask is on meta"),
        (dict(scale="big"), TypeError, "scale='big'"),
        (dict(scale=float("nan")), ValueError, "scale=nan"),
        (dict(scale=-float("inf")), ValueError, "scale=-inf is not finite in float32"),
        (dict(scale=10**400), ValueError, r"scale=1\.00000e\+400 is not finite in float32"),
        (dict(scale=1e60), ValueError, r"scale=1e\+60 is not finite in float32: expected at most 3.40282e\+38"),
        (dict(is_causal=1), TypeError, "is_causal=1 has type int"),
        (dict(group=object()), ValueError, "group=.*init_process_group"),
    ],
)  # fmt: skip
def test_the_operation_refuses(arguments, error, said):
    with pytest.raises(error, match=said):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(dim=30, heads=4), ValueError, "dim=30 is not divisible by heads=4"),
        (dict(dim=32, heads=4, kv_heads=3), ValueError, "heads=4 is not divisible by kv_heads=3"),
        (dict(heads=0), ValueError, "heads=0: expected at least 1"),
        (dict(dim=32.0), TypeError, "dim=32.0 has type float"),
        (dict(segment_size=4, dilation_rate=8), ValueError, r"dilation_rate=\(8,\) holds 8, more than its segment length 4"),
        (dict(segment_size=(4, 8), dilation_rate=1), ValueError, "segment_size.*dilation_rate.*differ in length"),
        (dict(dropout=1.5), ValueError, "dropout=1.5"),
        (dict(dropout="some"), TypeError, "dropout='some'"),
        (dict(causal="yes"), TypeError, "causal='yes' has type str"),
        (dict(causal=True, casual=False), ValueError, "causal=True and casual=False contradict"),
        (dict(distributed=True), ValueError, "distributed=True needs a process group"),
        (dict(Distributed=True), ValueError, "distributed=True needs a process group"),
        (dict(dim=12, heads=4, use_xpos=True), ValueError, "head_dim=3 is odd"),
        (dict(use_xpos=True, segment_size=1 << 20, xpos_scale_base=100.0), ValueError, "xpos_scale_base=100.0 is too small"),
        (dict(sub_norm="group"), ValueError, "'group'"),
        (dict(sub_norm="batch", causal=True), ValueError, "sub_norm='batch' with causal=True"),
        (dict(use_rel_pos_bias=True, rel_pos_buckets=3), ValueError, "num_buckets=3"),
    ],
)  # fmt: skip
def test_the_module_refuses(arguments, error, said):
    arguments = {"dim": 32, "heads": 4, "dilation_rate": 1, "segment_size": 8, **arguments}
    with pytest.raises(error, match=said):
        DilatedAttention(**arguments)


def test_a_pattern_that_leaves_positions_to_no_head_warns_once_and_names_them():
    q = torch.randn(1, 3, 32, 4)
    with pytest.warns(UserWarning, match=r"p mod 5 in \{3, 4\}"):
        dilated_attention(q, q, q, 20, 5)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dilated_attention(q, q, q, 20, 5)


def test_a_wrong_input_to_the_module_teaches():
    module = DilatedAttention(32, 4, 1, 8)
    with pytest.raises(ValueError, match=r"x has shape \(8, 16\): expected \(B, N, dim\) with dim=32"):
        module(torch.randn(8, 16))
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        module(torch.randn(2, 8, 32), torch.zeros(2, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    "bad",
    [
        dict(segment_lengths=(4.0, 8)),
        dict(segment_lengths=[4, 8.0]),
        dict(dilation_rates=(True, 2)),
        dict(window=True),
        dict(window=[1]),
        dict(dilated_queries=1),
        dict(dilation_block=1.0),
    ],
)
def test_what_only_equals_an_earlier_argument_is_refused(bad):
    good = dict(segment_lengths=(4, 8), dilation_rates=(1, 2), window=1, dilated_queries=True, dilation_block=1)
    call(**good)
    with pytest.raises(TypeError, match=next(iter(bad))):
        call(**good | bad)
