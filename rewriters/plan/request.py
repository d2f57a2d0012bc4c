"""What to rewrite, for which calls, and how: :class:`Request`, the one argument of the pipeline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn

from madtp.calls.call import Call
from madtp.calls.objects import CannotFlatten, on_tensors
from madtp.calls.packed_images import per_image_module
from madtp.config import PruningConfig
from madtp.errors import CaptureError
from rewriters.capture.scope import WHOLE, Region
from rewriters.plan.plan import Plan


@dataclass(frozen=True)
class Request:
    """A module to rewrite for calls of one kind.

    Attributes:
        model: The module of ``region``.
        call: A call of ``model``; the program serves calls like it.
        config: How to prune.
        region: Where ``model`` lies in the whole model, from which sites and modules are named.
        serial: Number of the program; it keeps the names of its constants distinct.
        existing_sites: Names of the sites that the pruned model has already, to which a further program adds none; None
            for the first program of a region.
        plan: An edited plan to follow instead of a new one.
    """

    model: nn.Module
    call: Call
    config: PruningConfig
    region: Region = WHOLE
    serial: int = 0
    existing_sites: frozenset[str] | None = None
    plan: Plan | None = None

    def opened(self, sizes: Collection[str] = ()) -> Request:
        """The request in the form that is traced.

        Objects in the call, such as a key/value cache, are replaced by their tensors and by the numbers at the paths
        ``sizes``. A region whose images are computed one by one takes a batch of them.

        Raises:
            CaptureError: An object in the call cannot be opened.
        """
        try:
            call = self.call.flattened(sizes)
        except CannotFlatten as error:
            raise CaptureError(
                f"{type(self.model).__name__} was called with an object that cannot be taken apart: {error}; leave it out "
                "of the call."
            ) from error
        model = per_image_module(on_tensors(self.model, call.objects, sizes), self.region.per_image)
        return replace(self, model=model, call=call)
