"""What tests of keys share: a fleet with two devices that are enrolled, the one that is harmed and the one that harms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fleet import Fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        running.enroll("victim")
        running.enroll("hostile")
        yield running
