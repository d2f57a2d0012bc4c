"""Which part of the model is captured and rewritten: :class:`Region`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from madtp.calls.packed_images import PerImageArguments
from madtp.programs.chained_modules import Chain, ChainedModules


@dataclass(frozen=True)
class Region:
    """The whole model, the submodule at ``path`` of it, or submodules that it calls one after the other.

    Attributes:
        path: Module path; ``""`` is the whole model, or the parent of a chain.
        modalities: Of a region's floating-point inputs, by their place in the call: what they descend from (``"image"``,
            ``"text"``, both or nothing), None if unknown.
        read_positions: Positions of tokens that the rest of the model reads in what the region returns.
        embeddings: Place in the call of the text embeddings ``[B, N, C]`` of which a further argument gives the image
            positions; ``""`` if there are none.
        per_image: How its calls are divided into images, each of which is computed by itself; None if they are not.
        chain: The submodules that are called one after the other; None if it is one module.
    """

    path: str = ""
    modalities: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    read_positions: tuple[int, ...] = ()
    embeddings: str = ""
    per_image: PerImageArguments | None = None
    chain: Chain | None = None

    @property
    def name(self) -> str:
        """What it is called in reports and messages; empty for the whole model."""
        return self.path if self.chain is None else str(self.chain)

    def module(self, model: nn.Module) -> nn.Module:
        """The region of ``model`` as one module."""
        return model.get_submodule(self.path) if self.chain is None else ChainedModules(model, self.chain.names)

    def inside(self, name: str) -> str:
        """The path in the whole model of what lies at ``name`` in the region."""
        return ".".join(part for part in (self.path, name) if part)

    def holds(self, name: str) -> bool:
        """Whether a module path of the whole model lies in the region."""
        if self.chain is not None:
            return any(Region(path).holds(name) for path in self.chain.names)
        return not self.path or name == self.path or name.startswith((f"{self.path}.", f"{self.path}#"))


WHOLE = Region()
