"""What `detect` finds in a model, without rewriting it. Start at :func:`found`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from random_vlts import Design, build, inputs
from torch import Tensor, nn

from madtp.calls.call import normalise_call
from rewriters.canonicalise.passes import canonicalise
from rewriters.capture.export import capture
from rewriters.detect.streams import detect
from rewriters.detect.structure import Stream, Structure


@dataclass(frozen=True)
class Found:
    """A model, the flattened inputs it was captured on, and the structure of its graph."""

    model: nn.Module
    leaves: tuple[Any, ...]
    structure: Structure

    def stream(self, modality: str) -> Stream:
        """The one stream of a modality."""
        (stream,) = (s for s in self.structure.streams if s.modality == modality)
        return stream

    @property
    def about(self) -> tuple[Any, ...]:
        """Inputs and model, as the policy asks for them."""
        return self.leaves, self.model


def found(model: nn.Module, given: Mapping[str, Tensor]) -> Found:
    """The structure of a model called with keyword arguments."""
    call = normalise_call(model, (), given)
    captured = capture(model, call)
    canonicalise(captured.graph)
    return Found(model, tuple(call.flat()[0]), detect(captured.graph))


@cache
def drawn(design: str) -> Found:
    """The structure of a random model, by its design as JSON."""
    legal = Design.from_json(design).legal()
    return found(build(legal), inputs(legal, 2, 7, 0))
