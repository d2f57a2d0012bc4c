"""Fixtures of the tests of recipes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shallow_models import shallow_models


@pytest.fixture
def shallow_zoo() -> Iterator[None]:
    """The zoo has the shallow models, too."""
    with shallow_models():
        yield
