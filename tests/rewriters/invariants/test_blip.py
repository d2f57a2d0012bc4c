"""The invariants hold for transformers' BLIP for image-text retrieval and the zoo's BLIP-NLVR."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")

from invariants import *  # noqa: E402, F403
from rewritten_models import Subject  # noqa: E402
from rewritten_models import subject as rewritten  # noqa: E402


@pytest.fixture(
    scope="module",
    params=[
        "blip_itm",
        "blip_nlvr",
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)
