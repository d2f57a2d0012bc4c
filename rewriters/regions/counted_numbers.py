"""Numbers of Python that a model counts as it runs, and computes with: start at :func:`counted_by`.

A program is a graph, in which such a number is a constant. So no program takes the place of a module whose results change with
a number that the module itself changes, such as the number of its calls. What is only counted does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from madtp.calls.agreement import require_agreement
from madtp.calls.call import Call
from madtp.calls.held_containers import Container, containers_in
from madtp.calls.stored_tensors import TORCHS_OWN
from madtp.errors import MadtpError
from madtp.sites.preserved_state import trial_run
from madtp.sites.steady_draws import comparable_draws, values_are_comparable
from rewriters.capture.scope import Region

COUNTED = "its forward changes {} and computes with it, which programs do not; keep such a number in a buffer"

Place = tuple[str, str]
"""The path of a module, and its attribute."""
NUMBERS = (bool, int, float)


def counted_by(model: nn.Module, call: Call) -> list[Place]:
    """Return where a model keeps numbers that it changes and computes with; it is run up to three times, without a trace."""
    if not values_are_comparable(model, call.tensors()):
        return []
    try:
        with torch.no_grad(), comparable_draws(model, call.tensors()), trial_run(model, (call.args, call.kwargs)):
            before = _numbers(model)
            model(*call.args, **call.kwargs)
            after = _numbers(model)
            changed = [place for place, numbers in after.items() if before.get(place, numbers) != numbers]
            if not changed or _repeats(model, call):
                return []
    except Exception:  # what is wrong with the call is told where it is captured
        return []
    return changed


def _repeats(model: nn.Module, call: Call) -> bool:
    """Whether the model gives the same once more, with other numbers and the same draws."""

    drawn, own = torch.get_rng_state(), (random.getstate(), np.random.get_state())

    def run() -> object:
        torch.set_rng_state(drawn)
        random.setstate(own[0])
        np.random.set_state(own[1])
        return model(*call.args, **call.kwargs)

    try:
        require_agreement(run, run)
    except MadtpError:
        return False
    return True


def _numbers(model: nn.Module) -> dict[Place, tuple[object, ...]]:
    """The numbers in the attributes of modules, and in what these hold."""
    found: dict[Place, tuple[object, ...]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in TORCHS_OWN and name != "training":
                own = tuple(_numbers_in(value))
                if own:
                    found[path, name] = own
    return found


def _numbers_in(value: object) -> Iterator[object]:
    if isinstance(value, NUMBERS):
        yield value
    for held in containers_in([value], set()):
        yield from (one for one in _entries(held) if isinstance(one, NUMBERS))


def _entries(held: Container) -> Sequence[object]:
    return list(held.values()) if isinstance(held, dict) else list(held)


def why_not_counted(counted: Sequence[Place], region: Region) -> str | None:
    """The reason why no program may take a region's place; None if modules in it do not compute with what they count."""
    names = [f"{path}.{name}".lstrip(".") for path, name in counted if region.holds(path)]
    return COUNTED.format(", ".join(names)) if names else None
