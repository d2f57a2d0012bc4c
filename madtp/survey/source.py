"""Where models and inputs come from: :class:`Source`. Such as :mod:`zoo.small`; the survey knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

Inputs = Mapping[str, Any]


class Source(Protocol):
    """A module that makes models by name."""

    def build(self, name: str, /) -> tuple[nn.Module, Inputs]:
        """Make a model and example inputs for it."""
        ...

    def further_inputs(self, model: nn.Module, inputs: Inputs, /) -> Mapping[str, Inputs]:
        """Make the example inputs in further forms that the model takes, by name."""
        ...
