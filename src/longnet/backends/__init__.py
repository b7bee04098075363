"""Ways to compute dilated attention. Siblings never import each other; :mod:`select` chooses."""

from longnet.backends.operators import Spec
from longnet.backends.select import BACKENDS, Backend, select_backend

__all__ = ["BACKENDS", "Backend", "Spec", "select_backend"]
