"""The invariants hold for two towers of torch.nn.TransformerEncoder, batch first and sequence first, pre- and post-norm."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("invariants")

from invariants import *  # noqa: E402, F403
from rewritten_models import Subject  # noqa: E402
from rewritten_models import subject as rewritten  # noqa: E402


@pytest.fixture(
    scope="module",
    params=[
        "towers_batch_first_post",
        "towers_batch_first_pre",
        "towers_sequence_first_post",
        "towers_sequence_first_pre",
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return rewritten(request.param)
