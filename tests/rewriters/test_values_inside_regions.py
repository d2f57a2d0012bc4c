"""What a model reads that a module inside a region has stored: such a module is left alone, and its neighbours are not."""

from __future__ import annotations

import pytest
import torch
from detection_hosts import Detector, ListingDetector, ReadingDetector, RememberingDetector, StoringDetector, detector

import madtp


@pytest.mark.parametrize("kind", [ListingDetector, ReadingDetector])
def test_a_region_that_stores_what_is_read_is_left_alone(kind: type[Detector]) -> None:
    model, inputs = detector(kind, faint=1.0)
    with torch.no_grad():
        model(**inputs)  # what it stores looks like what the rewrite will find
    pruned = madtp.rewrite(model, inputs)
    assert any(refusal.block == "first" for refusal in pruned.report.refusals)
    assert [site.name for site in pruned.report.sites] == ["fusion.image.0", "fusion.text.0"]
    for _ in range(2):
        inputs["pixels"] = torch.randn_like(inputs["pixels"])
        with torch.no_grad(), pruned.dense():
            torch.testing.assert_close(pruned(**inputs)["seen"], model(**inputs)["seen"])


@pytest.mark.parametrize("kind", [StoringDetector, RememberingDetector])
def test_what_nothing_reads_or_the_model_stores_itself_does_no_harm(kind: type[Detector]) -> None:
    model, inputs = detector(kind, faint=1.0)
    pruned = madtp.rewrite(model, inputs)
    assert "fusion.image.0" in {site.name for site in pruned.report.sites}
    assert not pruned.report.unpruned
    with torch.no_grad():
        pruned(**inputs)
    assert not pruned.report.unpruned


def test_what_stores_nothing_yet_is_noted_when_a_later_call_reads_it() -> None:
    class Later(StoringDetector):
        reads = False

        def detected(self, image: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().detected(image, words)
            return {**found, "seen": self.first.seen.mean(1)} if self.reads else found

    model, inputs = detector(Later, faint=1.0)
    pruned = madtp.rewrite(model, inputs)
    model.reads = pruned.reads = True
    with torch.no_grad(), pruned.dense():
        torch.testing.assert_close(pruned(**inputs)["seen"], model(**inputs)["seen"])
    assert "inside" in str(pruned.report.unpruned[0])
