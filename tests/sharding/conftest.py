from __future__ import annotations

import pytest
from ranks import Ranks, started


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Eight processes that stay for the session."""
    return started(str(tmp_path_factory.mktemp("ranks") / "store"))
