"""Random vision-language transformers are rewritten correctly or refused with a reason (invariant 7 of the design).

The default run draws a few; ``HYPOTHESIS_PROFILE=thorough`` and ``python -m random_vlts`` (in this folder) draw many.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from project_paths import SUPPORT
from random_vlts import Blocks, Design, build, designs, draw, inputs
from random_vlts.checks import examine, reproduction

import madtp

REGRESSIONS = json.loads((SUPPORT / "random_vlts" / "regressions.json").read_text())
# Explaining a failure would run it again hundreds of times.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


@pytest.mark.slow
@given(design=designs())
@settings(phases=PHASES)
def test_random_model_is_rewritten_correctly_or_refused_with_a_reason(design: Design) -> None:
    note(reproduction(design))
    with suppress(madtp.MadtpError):
        examine(design)


@pytest.mark.slow
@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: case["name"])
def test_what_once_failed_is_rewritten(case: dict[str, object]) -> None:
    assert not examine(Design.from_dict(case["design"])).lost()  # type: ignore[arg-type]


@given(design=designs(), batch=st.integers(1, 3), length=st.integers(4, 9))
@torch.no_grad()
def test_every_design_is_a_model(design: Design, batch: int, length: int) -> None:
    for value in build(design)(**inputs(design, batch, length, 0)).values():
        assert len(value) == batch
        assert bool(torch.isfinite(value).all())


@given(design=designs())
def test_designs_survive_json(design: Design) -> None:
    assert Design.from_json(design.to_json()) == design
    assert design.legal() == design


def test_a_seed_draws_one_design() -> None:
    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(50)}) == 50


def test_draws_reach_every_choice() -> None:
    drawn = [draw(seed) for seed in range(400)]
    for field in dataclasses.fields(Design):
        if field.name not in ("image", "text", "fusion"):
            assert len({getattr(d, field.name) for d in drawn}) > 1, field.name
    for field in dataclasses.fields(Blocks):
        assert len({getattr(d.text, field.name) for d in drawn}) > 1, field.name


@pytest.mark.slow
def test_the_command_draws_in_worker_processes() -> None:
    here = SUPPORT
    command = [sys.executable, "-m", "random_vlts", "0", "1"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 draws" in done.stdout
