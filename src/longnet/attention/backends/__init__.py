"""Ways to compute a whole pattern. See :mod:`longnet.attention.backends.select` for the choice of one."""

from longnet.attention.backends.select import BACKENDS, NAMES, VARIANTS, Backend, find_backend, select_backend

__all__ = ["BACKENDS", "NAMES", "VARIANTS", "Backend", "find_backend", "select_backend"]
