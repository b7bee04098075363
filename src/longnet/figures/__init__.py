"""Pictures of a pattern: what attends to what, how far layers see, what it costs, caches and sends. Needs numpy and matplotlib.

Figures are drawn on a canvas of their own, so no display is needed and pyplot's state is left alone.
"""

from longnet.figures.curves import plot_cache, plot_cost, plot_traffic
from longnet.figures.patterns import plot_pattern, plot_selection
from longnet.figures.reach import plot_receptive_field
from longnet.figures.shards import plot_shards

__all__ = [
    "plot_cache",
    "plot_cost",
    "plot_pattern",
    "plot_receptive_field",
    "plot_selection",
    "plot_shards",
    "plot_traffic",
]
