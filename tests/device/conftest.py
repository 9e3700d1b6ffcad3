"""What tests with real agents share: one broker for a file, and a coordinator by script for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices import Script
from tests.support.mosquitto import Mosquitto


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def script(broker: Mosquitto, tmp_path: Path) -> Iterator[Script]:
    """Every test has a federation of its own at the shared broker."""
    with Script(broker.port, tmp_path / "script", federation=tmp_path.name[-60:]) as running:
        yield running
