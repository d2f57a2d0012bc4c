"""One sample where a capture can only take two: the sample runs twice, side by side, and its half of the results is returned.

Start at :func:`serving_one_sample`. A batch dimension of size one cannot be told from other dimensions of size one, so captures
are made of two samples. Where export froze that size, the capture cannot serve a single sample as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from madtp.calls.batch import batch_size, sample_dim
from madtp.calls.call import Call
from madtp.calls.compare import compare
from madtp.calls.objects import ResultSpec
from madtp.errors import CaptureError, RewriteError
from madtp.programs.compiled_graph import CompiledForward
from madtp.programs.program import Program
from madtp.tokens.state import TokenState, batch_slice


@dataclass(kw_only=True)
class SingleSampleProgram(Program):
    """A program of two samples that serves one.

    Attributes:
        kept: the outputs that belong to the sample; others are entries of the other one in lists with an entry for each.
        halved: by output that is kept, the dimensions along which the first half belongs to the sample.
    """

    repeats: ClassVar[int] = 2
    kept: tuple[int, ...] = ()
    halved: tuple[tuple[int, ...], ...] = ()

    def serves(self, leaves: Sequence[object]) -> bool:
        """Whether the call holds one sample, and two of its kind are within the limits of the capture."""
        return sample_dims_of_one(leaves) is not None and super().serves(with_doubled_leaves(leaves))

    def outputs(self, forward: CompiledForward, root: nn.Module, leaves: Sequence[object]) -> list[object]:
        """Run the sample twice; returns what the model returns for one."""
        outputs = super().outputs(forward, root, with_doubled_leaves(leaves))
        return [_first_half(outputs[position], dims) for position, dims in zip(self.kept, self.halved, strict=True)]


def _first_half(output: object, dims: Sequence[int]) -> object:
    for dim in dims:
        assert isinstance(output, Tensor)
        output = output[(slice(None),) * dim + (slice(output.shape[dim] // 2),)]
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
    program: Program,
    module: nn.Module,
    host: nn.Module,
    call: Call,
    expected: object,
    returned: ResultSpec | None,
    *,
    values: bool,
) -> SingleSampleProgram:
    """Make a program of two samples serve one. Pruning has to be off.

    Args:
        program: a program of two samples.
        module: the module that the program was captured from.
        host: the module tree that the program runs on.
        call: a call of one sample.
        expected: what ``module`` returns for ``call``, objects opened.
        returned: how to close these.
        values: compare values; False compares structures and shapes only.

    Raises:
        CaptureError: what the program returns for two equal samples does not hold what is expected for one.
    """
    found, spec = pytree.tree_flatten(program.run(host, with_doubled_sample(call).flat()[0]))
    one, own = pytree.tree_flatten(expected)
    kept: tuple[int, ...] | None
    if program.returned is None or returned is None:
        kept = _leaves_of_one(own, spec)
    else:
        kept = _plain_leaves_of_one(returned, program.returned)
        returned = replace(returned, objects=program.returned.objects)
        opened = range(program.returned.plain_count(), len(found))
        kept = None if kept is None else (*kept, *opened)
    if kept is None or len(kept) != len(one):
        kept, own, returned = tuple(range(len(found))), program.out_spec, program.returned
    halved = tuple(_halved_dims(one[place], found[at]) if place < len(one) else () for place, at in enumerate(kept))
    sites = {place: program.output_sites[at] for place, at in enumerate(kept) if at in program.output_sites}
    fields = {**vars(program), "out_spec": own, "returned": returned, "output_sites": sites}
    single = SingleSampleProgram(**fields, kept=kept, halved=halved)
    try:
        compare(expected, single.run(host, call.flat()[0]), values=values)
    except RewriteError as error:
        raise CaptureError(
            f"{type(module).__name__} was called with one sample, and torch.export froze its batch size, or forward asks for "
            f"it, so a capture of two samples has to serve it, but {error} Call it with at least 2 samples, or write "
            "x.shape[0] where forward says len(x) or int(...)."
        ) from error
    return single


def _leaves_of_one(one: pytree.TreeSpec, two: pytree.TreeSpec, start: int = 0) -> tuple[int, ...] | None:
    """Which leaves of the structure for two samples make up that for one, where lists have entries for each sample.

    Returns:
        None if the structures differ in another way.
    """
    if one == two:
        return tuple(range(start, start + two.num_leaves))
    if one.is_leaf() or two.is_leaf() or one.type is not two.type:
        return None
    own, both = one.children(), two.children()
    of_samples = one.type in (list, tuple) and len(both) == 2 * len(own)
    if not of_samples and (len(both) != len(own) or one.context != two.context):
        return None
    kept: list[int] = []
    for first, second in zip(own, both, strict=False):
        inside = _leaves_of_one(first, second, start)
        if inside is None:
            return None
        kept += inside
        start += second.num_leaves
    return tuple(kept)


def _plain_leaves_of_one(one: ResultSpec, two: ResultSpec) -> tuple[int, ...] | None:
    """The same for results that hold objects: which of the leaves that are none."""
    kept = _leaves_of_one(one.spec, two.spec)
    if kept is None or one.numbers != tuple(two.numbers[at] for at in kept):
        return None
    plain = [at for at, number in enumerate(two.numbers) if number is None]
    return tuple(plain.index(at) for at in kept if two.numbers[at] is None)


def _halved_dims(one: object, two: object) -> tuple[int, ...]:
    """The dimensions of an output that are twice as large for two samples."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dim() != two.dim():
        return ()
    return tuple(d for d, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if m == 2 * n)


def first_samples(states: Mapping[str, TokenState]) -> dict[str, TokenState]:
    """The states of the first of two equal samples."""
    return {name: batch_slice(state, 0, 1) if state.batch == 2 else state for name, state in states.items()}
