"""Ways to compute a whole pattern. See :mod:`longnet.backends.select` for the choice of one."""

from longnet.backends.select import BACKENDS, Backend, select_backend

__all__ = ["BACKENDS", "Backend", "select_backend"]
