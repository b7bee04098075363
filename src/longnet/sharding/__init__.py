"""One sequence over many ranks: each holds a contiguous shard, and only selected rows of shared segments travel."""

from longnet.sharding.group import Peers, give_up, lengths_of, peers_of, untraced
from longnet.sharding.loss import mean_over
from longnet.sharding.operators import sharded_attention

__all__ = ["Peers", "give_up", "lengths_of", "mean_over", "peers_of", "sharded_attention", "untraced"]
