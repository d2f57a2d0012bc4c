"""Which part of the model is captured and rewritten: :class:`Region`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from madtp.calls.packed_images import PerImageArguments


@dataclass(frozen=True)
class Region:
    """The whole model, or the submodule at ``path`` of it.

    Attributes:
        path: Module path; ``""`` is the whole model.
        modalities: Of a region's floating-point inputs, by their place in the call: what they descend from (``"image"``,
            ``"text"``, both or nothing), None if unknown.
        read_positions: Positions of tokens that the rest of the model reads in what the region returns.
        embeddings: Place in the call of the text embeddings ``[B, N, C]`` of which a further argument gives the image
            positions; ``""`` if there are none.
        per_image: How its calls are divided into images, each of which is computed by itself; None if they are not.
    """

    path: str = ""
    modalities: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    read_positions: tuple[int, ...] = ()
    embeddings: str = ""
    per_image: PerImageArguments | None = None

    def inside(self, name: str) -> str:
        """The path in the whole model of what lies at ``name`` in the region."""
        return ".".join(part for part in (self.path, name) if part)

    def holds(self, name: str) -> bool:
        """Whether a module path of the whole model lies in the region."""
        return not self.path or name == self.path or name.startswith((f"{self.path}.", f"{self.path}#"))


WHOLE = Region()
