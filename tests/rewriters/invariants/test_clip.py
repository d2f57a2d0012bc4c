"""The invariants hold for transformers' CLIP and SigLIP, with fused and with spelled-out attention."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")

from invariants import *  # noqa: E402, F403
from rewritten_models import Subject  # noqa: E402
from rewritten_models import subject as rewritten  # noqa: E402


@pytest.fixture(
    scope="module",
    params=[
        "clip_sdpa",
        "clip_eager",
        "siglip_sdpa",
        "siglip_eager",
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)
