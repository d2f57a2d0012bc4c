"""The pruned model: what :func:`madtp.rewrite` returns.

Start at :class:`PrunedModel`. It is of the host's class and holds the original's parameters under their own names. All that
pruning adds lies in the one child ``madtp``, a :class:`~madtp.pruned.handle.PruningHandle`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import nn

from madtp.calls.compiling import is_compiling, is_exporting
from madtp.errors import ExportError, MadtpError
from madtp.programs.host_forward import HostForward
from madtp.pruned.handle import PruningHandle, with_alignment

HOW_TO_EXPORT = "Fix the counts with madtp.freeze(pruned, batches) first; madtp.export then writes a file."
NO_REPLICAS = (
    "nn.DataParallel copies a model anew for every call, and programs belong to one copy. Use "
    "nn.parallel.DistributedDataParallel, which torch recommends in its place: with torchrun, one process for each GPU."
)


class PrunedModel(nn.Module):
    """What a pruned model is besides the host's own class: a drop-in for the original that prunes tokens.

    A pruned model is an instance of this class and of the host's: call it, train it and save it as the original. Its signature,
    outputs, parameter names, attributes and methods are the original's, and its parameters are shared with it. All that pruning
    adds lies in its child :attr:`madtp`. What is asked for most has short forms on the model itself (:data:`SHORT_FORMS`), such
    as ``pruned.temperature``, where the host has no attribute of that name; the host's own wins.

    Attributes:
        madtp: strength, report, token counts, MACs and alignment loss.

    Example::

        pruned = madtp.rewrite(model, inputs)
        madtp.calibrate(pruned, batches, reduction=0.5)
        output = pruned(**inputs)
        pruned.madtp.token_counts()  # {"visual_encoder.blocks.0": tensor([412, 397]), ...}
    """

    madtp: PruningHandle

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not tell the host's base classes, which may keep a register of their subclasses or ask for arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; arguments and return type are the original's."""
        handle = self.madtp
        if not is_compiling():
            if torch._C._is_tracing():
                how = "Use madtp.export." if handle.control.counts_are_fixed() else HOW_TO_EXPORT
                raise ExportError(f"torch.jit.trace would keep what Python decides for one input. {how}")
            return _run(self, args, kwargs)
        run = handle.forward_of_host
        assert run is not None
        shapes_vary = handle.control.active and not handle.control.counts_are_fixed()
        if shapes_vary and is_exporting():
            raise ExportError(f"token counts depend on the input, so shapes are not known. {HOW_TO_EXPORT}")
        if isinstance(run, HostForward) and not is_exporting():
            shapes_vary |= run.follows_features or run.chained or not run.reproduces(args, kwargs)
        if shapes_vary or (handle.alignment_weight and self.training):
            return _run_uncompiled(self, args, kwargs)
        handle.control.compiled = True
        return run.compiled(*args, **kwargs)

    def __copy__(self) -> PrunedModel:
        """A copy that shares everything with this model, as of any module."""
        fresh: PrunedModel = object.__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        return fresh

    def __deepcopy__(self, memo: dict[int, object]) -> PrunedModel:
        """A pruned model of its own, with programs of its own."""
        fresh: PrunedModel = object.__new__(type(self))
        memo[id(self)] = fresh
        fresh.__dict__.update(copy.deepcopy(self.__dict__, memo))
        fresh.__dict__.pop("_compiled_call_impl", None)  # it runs the model that was compiled
        return fresh

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """What :mod:`pickle` keeps. The model is rewritten again when it is read."""
        from madtp.saving.pickling import reduced

        return reduced(self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise MadtpError(NO_REPLICAS)


def _run(model: PrunedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handle = model.madtp
    assert handle.forward_of_host is not None
    output = handle.forward_of_host(*args, **kwargs)
    if handle.alignment_weight and model.training and torch.is_grad_enabled():
        return with_alignment(output, handle)
    return output


# The forward where shapes, or the positions of image features, depend on values: torch.compile breaks the graph around it.
_run_uncompiled: Callable[..., Any] = torch.compiler.disable(
    _run, reason=f"token counts or image positions depend on the input. {HOW_TO_EXPORT}"
)
