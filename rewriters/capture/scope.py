"""Which part of the model is rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from madtp.calls.per_image import PerImageArguments


@dataclass(frozen=True)
class Region:
    """What is captured: the whole model, or the submodule at ``path`` of it.

    modalities: of a region's floating inputs ("image", "text", both, or nothing), by their place in the call.
    read: positions of tokens that the rest of the model reads in what the region returns.
    written: place in the call of the tensor of which a further argument says where image features were written; "" if none.
    apart: how its calls are taken apart into images, each of which is computed by itself; None if they are not.
    """

    path: str = ""
    modalities: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    read: tuple[int, ...] = ()
    written: str = ""
    apart: PerImageArguments | None = None

    def inside(self, name: str) -> str:
        """The path in the whole model of what lies at ``name`` in the region."""
        return ".".join(part for part in (self.path, name) if part)

    def holds(self, name: str) -> bool:
        """Whether a module path of the whole model lies in the region."""
        return not self.path or name == self.path or name.startswith((f"{self.path}.", f"{self.path}#"))


WHOLE = Region()
