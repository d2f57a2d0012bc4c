"""A scorer of a user's own: how it is registered, what it is told, and what it decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from case_models import vit
from torch import Tensor

import madtp
from madtp.config import REGISTERED, PruningConfig
from madtp.errors import ConfigError
from madtp.method.parts import PARTS, register_scorer
from madtp.method.scorers import Evidence, Needs, Scorer


class Brightest(Scorer):
    """The largest first channel; a tensor, whatever the evidence is."""

    name = "brightest"
    needs: ClassVar[Needs] = Needs(features=True)

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def score(self, evidence: Evidence[Any], config: PruningConfig) -> Tensor:
        assert evidence.features is not None
        self.given.append(evidence.features.tokens[..., 0])
        return self.given[-1]


class Shapeless(Brightest):
    name = "shapeless"

    def score(self, evidence: Evidence[Any], config: PruningConfig) -> Tensor:
        return super().score(evidence, config).mean(1)


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    names, parts = set(REGISTERED), dict(PARTS)
    yield
    REGISTERED.clear()
    REGISTERED.update(names)
    PARTS.clear()
    PARTS.update(parts)


def rewritten(selection: str, **fields: Any) -> madtp.PrunedModel:
    inputs = {"x": torch.randn(4, 3, 32, 32)}
    return madtp.rewrite(vit(), inputs, config=PruningConfig(selection=selection, keep_ratio=0.5, **fields))


@torch.no_grad()
@pytest.mark.parametrize("merge", [None, True])
def test_the_tokens_that_score_highest_survive(merge: bool | None) -> None:
    scorer = Brightest()
    register_scorer(scorer)
    pruned = rewritten("brightest", merge=merge)
    scorer.given.clear()
    pruned(x=torch.randn(3, 3, 32, 32))
    kept = pruned.madtp.kept_tokens()["blocks.0"]
    best = scorer.given[0][:, -16:].topk(8).indices + 1  # the class token is not always among those that are scored
    for mask, row in zip(kept, best, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == {0, *row.tolist()}


@torch.no_grad()
def test_calibration_finds_its_share() -> None:
    register_scorer(Brightest())
    pruned = rewritten("brightest")
    found = madtp.calibrate(pruned, [{"x": torch.randn(4, 3, 32, 32)}], reduction=0.35, tolerance=0.05)
    assert found.steer == "keep_ratio"
    assert found.reduction_reached == pytest.approx(0.35, abs=0.05)
    priced = pruned.madtp.macs_by_module()
    assert not any(amount for path, amount in priced.items() if path.startswith("madtp.")), "no guidance is computed"


@torch.no_grad()
def test_a_saved_model_asks_for_its_scorer(tmp_path: Any) -> None:
    register_scorer(Brightest())
    madtp.save(rewritten("brightest"), tmp_path)
    REGISTERED.discard("brightest")
    with pytest.raises(madtp.MadtpError, match=r"'brightest'.*register_scorer"):
        madtp.load(tmp_path, vit())
    register_scorer(Brightest())
    assert madtp.load(tmp_path, vit()).madtp.config.selection == "brightest"


def test_a_scorer_takes_a_share() -> None:
    register_scorer(Brightest())
    with pytest.raises(ConfigError, match="give keep_ratio"):
        PruningConfig(selection="brightest")
    assert not PruningConfig(selection="brightest", keep_ratio=0.5).merges


@torch.no_grad()
def test_scores_of_another_shape_are_refused() -> None:
    register_scorer(Shapeless())
    with pytest.raises(madtp.MadtpError, match=r"'shapeless' returned scores \[4\] for tokens \[4, 17\]"):
        rewritten("shapeless")


class Taken(Brightest):
    name = "diversity"


class Nameless(Scorer):
    needs: ClassVar[Needs] = Needs(features=True)

    def score(self, evidence: Evidence[Any], config: PruningConfig) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("scorer", "message"),
    [(Taken(), "'diversity' belongs to"), (Nameless(), "Nameless has no name"), (Brightest, "pass an instance")],
)
def test_what_cannot_be_registered(scorer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_scorer(scorer)
