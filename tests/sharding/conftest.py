from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks, started


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Eight processes that stay for the session."""
    with started(str(tmp_path_factory.mktemp("ranks") / "store")) as running:
        yield running
