"""One sample where a capture can only take two: the sample runs twice, side by side, and its half of the results is returned.

Start at :func:`serving_one_sample`. A batch dimension of size one cannot be told from other dimensions of size one, so captures
are made of two samples. Where export froze that size, the capture cannot serve a single sample as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size, sample_dim
from madtp.calls.call import Call
from madtp.calls.compare import compare
from madtp.errors import CaptureError, RewriteError
from madtp.programs.compiled_graph import CompiledForward
from madtp.programs.program import Program
from madtp.tokens.state import TokenState, batch_slice


@dataclass(kw_only=True)
class SingleSampleProgram(Program):
    """A program of two samples that serves one.

    Attributes:
        halved: by output, the dimensions along which the first half belongs to the sample.
    """

    repeats: ClassVar[int] = 2
    halved: tuple[tuple[int, ...], ...] = ()

    def serves(self, leaves: Sequence[object]) -> bool:
        """Whether the call holds one sample, and two of its kind are within the limits of the capture."""
        return sample_dims_of_one(leaves) is not None and super().serves(with_doubled_leaves(leaves))

    def outputs(self, forward: CompiledForward, root: nn.Module, leaves: Sequence[object]) -> list[object]:
        """Run the sample twice; returns what the model returns for one."""
        outputs = super().outputs(forward, root, with_doubled_leaves(leaves))
        for position, dims in enumerate(self.halved):
            outputs[position] = _first_half(outputs[position], dims)
        return outputs


def _first_half(output: object, dims: Sequence[int]) -> object:
    for dim in dims:
        assert isinstance(output, Tensor)
        output = output.narrow(dim, 0, output.shape[dim] // 2)
    return output


def with_doubled_leaves(leaves: Sequence[object]) -> list[object]:
    """The leaves of a call of one sample, with that sample twice in each tensor."""
    dims = sample_dims_of_one(leaves)
    assert dims is not None
    return [
        torch.cat([x, x], dim) if dim is not None and isinstance(x, Tensor) else x
        for x, dim in zip(leaves, dims, strict=True)
    ]


def with_doubled_sample(call: Call) -> Call:
    """A call of one sample as a call of two; other calls as they are."""
    leaves = call.flat()[0]
    return call if sample_dims_of_one(leaves) is None else call.with_leaves(with_doubled_leaves(leaves))


def sample_dims_of_one(leaves: Sequence[object]) -> tuple[int | None, ...] | None:
    """By leaf, the dimension along which the one sample of a call can be doubled.

    A tensor without a batch dimension holds the sample's rows, in a form that packs those of all samples: its first dimension
    is doubled.

    Returns:
        None for other leaves than tensors, and as a whole if the call has more than one sample.
    """
    if batch_size(leaves) != 1 or not any(isinstance(x, Tensor) and x.dim() for x in leaves):
        return None
    dims: list[int | None] = []
    for leaf in leaves:
        known = sample_dim(leaf, 1)
        dims.append(0 if known is None and isinstance(leaf, Tensor) and leaf.dim() else known)
    return tuple(dims)


def serving_one_sample(
    program: Program, module: nn.Module, host: nn.Module, call: Call, expected: object
) -> SingleSampleProgram:
    """Make a program of two samples serve one. Pruning has to be off.

    Args:
        program: a program of two samples.
        module: the module that the program was captured from.
        host: the module tree that the program runs on.
        call: a call of one sample.
        expected: what ``module`` returns for ``call``.

    Raises:
        CaptureError: what the program returns for two equal samples does not hold what is expected for one.
    """
    returned = program.run(host, with_doubled_sample(call).flat()[0])
    halved = tuple(map(_halved_dims, pytree.tree_leaves(expected), pytree.tree_leaves(returned)))
    single = SingleSampleProgram(**vars(program), halved=halved)
    try:
        compare(expected, single.run(host, call.flat()[0]), values=not any(m.training for m in module.modules()))
    except RewriteError as error:
        raise CaptureError(
            f"{type(module).__name__} was called with one sample, and torch.export froze its batch size, or forward asks for "
            f"it, so a capture of two samples has to serve it, but {error} Call it with at least 2 samples, or write "
            "x.shape[0] where forward says len(x) or int(...)."
        ) from error
    return single


def _halved_dims(one: object, two: object) -> tuple[int, ...]:
    """The dimensions of an output that are twice as large for two samples."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dim() != two.dim():
        return ()
    return tuple(d for d, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if m == 2 * n)


def first_samples(states: Mapping[str, TokenState]) -> dict[str, TokenState]:
    """The states of the first of two equal samples."""
    return {name: batch_slice(state, 0, 1) if state.batch == 2 else state for name, state in states.items()}
