"""Pictures of a pattern: attention, receptive field, cost, cache and traffic. Needs numpy and matplotlib.

Figures are drawn without pyplot, so they need no display and change no global state.
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
