"""Which rows attend to which: patterns, plans, and what they cost. Integers and the standard library only."""

from longnet.geometry.cost import Cost, KeysPerQuery, Work, cost, keys_per_query, score_pairs, score_pairs_by_shard
from longnet.geometry.coverage import Coverage, Uncovered, coverage, uncovered_positions
from longnet.geometry.pattern import HEAD_OFFSETS, HeadNumbers, HeadOffsets, Pattern
from longnet.geometry.plan import BranchPlan, Plan, Tile, make_plan
from longnet.geometry.reach import LayerReach, receptive_field
from longnet.geometry.rows import Branch
from longnet.geometry.suggest import suggest_pattern

__all__ = [
    "HEAD_OFFSETS",
    "Branch",
    "BranchPlan",
    "Cost",
    "Coverage",
    "HeadNumbers",
    "HeadOffsets",
    "KeysPerQuery",
    "LayerReach",
    "Pattern",
    "Plan",
    "Tile",
    "Uncovered",
    "Work",
    "cost",
    "coverage",
    "keys_per_query",
    "make_plan",
    "receptive_field",
    "score_pairs",
    "score_pairs_by_shard",
    "suggest_pattern",
    "uncovered_positions",
]
