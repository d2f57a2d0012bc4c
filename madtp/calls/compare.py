"""Compare what two models return: :func:`compare` whole structures, :func:`relative_difference` two tensors.

Runs that are to be compared go inside :func:`drawing_alike`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.errors import RewriteError

RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2
NOISIER = 3.0
"""A result may be so much farther from the exact one than another that differs from it by rounding alone."""
LARGE = 1e30
"""Numbers of this size and above stand for infinity (masked logits)."""


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Inside the block random numbers are those of every such block (models may draw in eval mode, an order of patches, say);
    afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def relative_difference(want: Tensor, have: Tensor, *, floor: float = 1e-6) -> float:
    """Largest difference of two floating tensors of one shape, relative to the largest finite value of ``want``.

    Infinite where one holds a number and the other infinity or NaN. ``floor``: the least scale.
    """
    if want.is_complex():
        want, have = torch.view_as_real(want), torch.view_as_real(have)
    want, have = want.detach().double(), have.detach().double()
    finite = want.isfinite() & (want.abs() < LARGE)
    if not torch.equal(finite, have.isfinite() & (have.abs() < LARGE)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = want[finite].abs().amax().clamp(min=floor)
    return float((want - have)[finite].abs().amax() / scale)


def compare(expected: Any, actual: Any, *, values: bool = True) -> None:
    """Raise :class:`RewriteError` unless two output structures agree: to float tolerance, or only in their shapes."""
    first, second = _by_path(expected), _by_path(actual)
    if first.keys() != second.keys() or type(expected) is not type(actual):
        raise RewriteError(
            f"the rewritten model returns {type(actual).__name__} with {len(second)} tensors, the original "
            f"{type(expected).__name__} with {len(first)}."
        )
    for position, (path, want) in enumerate(first.items()):
        have = second[path]
        if not isinstance(want, Tensor):
            if isinstance(want, int) and want != have:
                raise RewriteError(f"output {position} is {have} instead of {want}.")
            continue
        if not isinstance(have, Tensor):
            raise RewriteError(f"output {position} is {type(have).__name__} instead of a tensor.")
        if want.shape != have.shape:
            raise RewriteError(f"output {position} has shape {tuple(have.shape)} instead of {tuple(want.shape)}.")
        if not values:
            continue
        if not want.dtype.is_floating_point:
            if not torch.equal(want, have):
                raise RewriteError(f"output {position} differs from the original's.")
            continue
        error = relative_difference(want, have)
        if error > RELATIVE.get(want.dtype, COARSE):
            raise RewriteError(
                f"with pruning off, output {position} differs from the original's by {error:.1e} of its scale. The "
                "rewritten graph would be wrong, so it is refused; please report the model."
            )


def rounds_alike(exact: Any, original: Any, own: Any) -> bool:
    """Whether two results in single precision are about as near to the exact one, output by output.

    Deep convolutions and badly scaled weights make a model round by more than the tolerance; then no other order of summation
    can agree with it any better.
    """
    truth, first, second = (_by_path(result) for result in (exact, original, own))
    if not truth.keys() == first.keys() == second.keys():
        return False
    for path, want in truth.items():
        if not isinstance(want, Tensor) or not want.dtype.is_floating_point or not want.numel():
            continue
        noise, error = (relative_difference(want, found[path]) for found in (first, second))
        if not error <= NOISIER * noise:
            return False
    return True


def _by_path(output: Any) -> dict[str, Any]:
    """Leaves by their path: what is kept by name is compared by name, in whatever order it was written."""
    try:
        return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(output)[0]}
    except ValueError:  # a container that was registered without names
        return {str(place): leaf for place, leaf in enumerate(pytree.tree_leaves(output))}
