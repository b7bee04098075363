from __future__ import annotations

import pytest
from ranks import Ranks, started


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Eight processes that stay for the session."""
    return started(str(tmp_path_factory.mktemp("ranks") / "store"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them in one worker of pytest-xdist, which starts the processes once."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))
