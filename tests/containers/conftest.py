"""One small image for all tests here, built as a user builds images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import making


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := making.obstacle():
        pytest.skip(reason)
    return making.base(tmp_path_factory.mktemp("base") / "root")


@pytest.fixture(scope="session")
def image(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.build(tmp_path_factory.mktemp("image"), base)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Node-local scratch of this test alone."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test builds the image."""
    for item in items:
        if "image" in getattr(item, "fixturenames", ()) or "base" in getattr(
            item, "fixturenames", ()
        ):
            item.add_marker(pytest.mark.timeout(900))
