"""One sample where a capture can only take two: the sample runs twice, side by side, and the first half is handed back.

Start at :func:`as_pair`. A batch axis of size one cannot be told from other axes of size one, so captures are made of two.
Where export froze that size, no capture serves a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size, sample_dim
from madtp.calls.call import Call
from madtp.calls.compare import compare
from madtp.errors import CaptureError, RewriteError
from madtp.programs.program import Program
from madtp.tokens.state import TokenState, batch_slice


@dataclass
class Pair(Program):
    """A program of two samples that serves one. halved: by output, the dimensions of which the first half is the sample's."""

    repeats: ClassVar[int] = 2
    halved: tuple[tuple[int, ...], ...] = ()

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the call holds one sample, and two of its kind are within the limits of the capture."""
        return doubled_dims(leaves) is not None and super().serves(twice(leaves))

    def outputs(self, forward: Callable[..., Any], root: nn.Module, leaves: Sequence[Any]) -> list[Any]:
        """Call the graph on the sample twice; returns what the model returns for one."""
        outputs = super().outputs(forward, root, twice(leaves))
        for position, dims in enumerate(self.halved):
            for dim in dims:
                outputs[position] = outputs[position].narrow(dim, 0, outputs[position].shape[dim] // 2)
        return outputs


def twice(leaves: Sequence[Any]) -> list[Any]:
    """The tensors of one sample with that sample doubled; anything else as it is."""
    dims = doubled_dims(leaves)
    assert dims is not None
    return [x if dim is None else torch.cat([x, x], dim) for x, dim in zip(leaves, dims, strict=True)]


def doubled(call: Call) -> Call:
    """A call of one sample as one of two; other calls as they are."""
    leaves = call.flat()[0]
    return call if doubled_dims(leaves) is None else call.with_leaves(twice(leaves))


def doubled_dims(leaves: Sequence[Any]) -> tuple[int | None, ...] | None:
    """The dimension of each tensor along which one sample is doubled; None if there are other than one sample.

    Beside tensors of one sample, one without a batch dimension holds that sample's part of rows packed for all.
    """
    if batch_size(leaves) != 1 or not any(isinstance(x, Tensor) and x.dim() for x in leaves):
        return None
    dims: list[int | None] = []
    for leaf in leaves:
        known = sample_dim(leaf, 1)
        dims.append(0 if known is None and isinstance(leaf, Tensor) and leaf.dim() else known)
    return tuple(dims)


def as_pair(program: Program, module: nn.Module, host: nn.Module, call: Call, wanted: Any) -> Pair:
    """The program of two samples, made to serve ``call`` of one, for which ``module`` returns ``wanted``.

    Pruning has to be off.

    Raises:
        CaptureError: what the program returns for two equal samples does not hold what is wanted for one.
    """
    found = program.run(host, doubled(call).flat()[0])
    halved = tuple(map(_halved, pytree.tree_leaves(wanted), pytree.tree_leaves(found)))
    pair = Pair(**vars(program), halved=halved)
    try:
        compare(wanted, pair.run(host, call.flat()[0]), values=not any(m.training for m in module.modules()))
    except RewriteError as error:
        raise CaptureError(
            f"{type(module).__name__} was called with one sample, and torch.export froze its batch size, or forward asks for "
            f"it, so a capture of two samples has to serve it, but {error} Call it with at least 2 samples, or write "
            "x.shape[0] where forward says len(x) or int(...)."
        ) from error
    return pair


def _halved(wanted: Any, found: Any) -> tuple[int, ...]:
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor) or wanted.dim() != found.dim():
        return ()
    return tuple(d for d, (n, m) in enumerate(zip(wanted.shape, found.shape, strict=True)) if m == 2 * n)


def first_of_each(states: Mapping[str, TokenState]) -> dict[str, TokenState]:
    """The states of the sample itself."""
    return {name: batch_slice(state, 0, 1) if state.batch == 2 else state for name, state in states.items()}
