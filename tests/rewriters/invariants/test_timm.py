"""The invariants hold for timm's VisionTransformer: class token, registers, pooling by mean and by attention."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")

from invariants import *  # noqa: E402, F403
from rewritten_models import Subject  # noqa: E402
from rewritten_models import subject as rewritten  # noqa: E402


@pytest.fixture(
    scope="module",
    params=[
        "vit",
        "vit_registers",
        "vit_mean",
        "vit_mean_no_class",
        "vit_attention_pool",
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)
