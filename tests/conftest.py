"""What all tests share: repeatable examples, and threads that leave each other room."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# The same examples every time; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("repeatable")

# Without a GPU, Triton kernels run in its interpreter; it has to know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers of pytest-xdist share the machine: a pool of threads as large as it is in each of them only makes them wait.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
