"""What all tests share: repeatable examples, and threads that leave each other room."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import serving
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


@pytest.fixture(scope="session")
def forked() -> Iterator[list[str]]:
    """The start of a command line, before ``-m MODULE`` or a script: see :mod:`forked`."""
    with serving("torch", "longnet", "longnet.cli.main", "longnet.training", "longnet.reading") as start:
        yield start


@pytest.fixture(scope="session")
def forked_hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Path]]:
    """The same with transformers imported and longnet not; its home of Hugging Face, which may not reach the network."""
    home = tmp_path_factory.mktemp("home")
    imported = (
        "torch",
        "torch._dynamo",
        "transformers.generation.utils",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with serving(*imported) as start:
            yield start, home


# Fixtures that take long to make, and the tests that share one: all of them run in one worker of pytest-xdist.
_GROUPS = {
    "ranks": "ranks",
    "forked": "commands",
    "forked_hf": "transformers",
    "quick_gpu_run": "gpu benchmark",
    "quick": "benchmark",
    "trained": "training benchmark",
}


# Modules stay until the end, so no collection has to walk all that they hold: none while they are imported, and none of
# those that transformers' Trainer and others ask for in every call (half a second each). What tests make is collected.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    # A test may change how calls are cut; what others wrote down is for another cut.
    from longnet.attention.backends.triton.backend import STEPS

    STEPS.clear()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


# Files and folders that compile, start processes or run Triton's interpreter: `make quick` leaves them out.
_SLOW = (
    "backends/test_dead_rows.py",
    "backends/test_hopper_compiles.py",
    "backends/test_operators.py",
    "backends/test_triton.py",
    "backends/test_triton_bands.py",
    "benchmarks",
    "cli/test_compressed_models.py",
    "cli/test_consoles.py",
    "cli/test_generate.py",
    "cli/test_stream.py",
    "cli/test_train.py",
    "compat/test_needed_by_first.py",
    "gigapath/test_called_modules.py",
    "gigapath/test_compiled_encoder.py",
    "gigapath/test_exported_encoder.py",
    "gigapath/test_slide_encoder.py",
    "hf",
    "models/test_model_training.py",
    "sharding",
    "slides/test_finetune_ranks.py",
    "slides/test_finetune_runs.py",
    "streaming/test_fused_step.py",
    "test_figures.py",
    "test_head_numbers.py",
    "test_notebooks.py",
    "test_readme.py",
    "training/test_liveness.py",
    "training/test_training_lock.py",
    "training/test_training_ranks.py",
    "training/test_training_report.py",
    "training/test_training_sharded.py",
    "training/test_training_windows.py",
)
_HERE = Path(__file__).parent


# Before pytest-xdist's own, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(_HERE).as_posix().startswith(_SLOW):
            item.add_marker(pytest.mark.slow)
        for fixture, group in _GROUPS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(group))
