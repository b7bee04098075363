"""One sequence over many ranks: each holds a contiguous shard, and only selected rows of shared segments travel."""

from longnet.attention.sharding.group import Peers, broadcast_error, lengths_of, peers_of
from longnet.attention.sharding.loss import mean_over
from longnet.attention.sharding.operators import sharded_attention
from longnet.attention.sharding.place import group_of, shard_place
from longnet.attention.sharding.row_before import row_before

__all__ = [
    "Peers",
    "broadcast_error",
    "group_of",
    "lengths_of",
    "mean_over",
    "peers_of",
    "row_before",
    "shard_place",
    "sharded_attention",
]
