"""A stream that pruning cannot pay for is noted in the report, and only then."""

from __future__ import annotations

import pytest
from small_vit import images, vit

import madtp


@pytest.mark.parametrize(("tokens", "noted"), [(4, False), (20_000, True)])
def test_a_stream_that_pays_for_no_guidance_is_noted(tokens: int, noted: bool) -> None:
    pruned = madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=madtp.PruningConfig(alignment_tokens=tokens))
    assert any("costs more than it can save from blocks.0 on" in note for note in pruned.report.notes) is noted
    assert (f"than {tokens} alignment tokens pay for" in "".join(pruned.report.notes)) is noted


def test_without_guidance_there_is_nothing_to_pay() -> None:
    config = madtp.PruningConfig(alignment_tokens=20_000, alignment=False)
    assert madtp.rewrite(vit(depth=2), {"x": images(2, 0)}, config=config).report.notes == []
