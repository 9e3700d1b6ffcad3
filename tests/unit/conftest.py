"""What the unit tests share: tests that say what every engine promises run once with each."""

from __future__ import annotations

import pytest

from tests.support.engines import NAMES, alone


@pytest.fixture(scope="module", params=NAMES)
def every_engine(request):
    """Let one engine after the other be the only one that there is; give its name."""
    with alone(request.param):
        yield request.param
