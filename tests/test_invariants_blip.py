"""The invariants hold for transformers' BLIP for image-text retrieval and the zoo's BLIP-NLVR."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")

from invariants import *  # noqa: E402, F403
from rewrites import Subject  # noqa: E402
from rewrites import subject as rewritten  # noqa: E402


@pytest.fixture(
    scope="module",
    params=[
        "blip_itm",
        "blip_nlvr",
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)
