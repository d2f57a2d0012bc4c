"""Compare what two models return: :func:`compare` whole structures, :func:`relative_difference` two tensors.

Runs that are to be compared go inside :func:`madtp.sites.preserved_state.trial_run`, so that both draw the same random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from madtp.errors import RewriteError

RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 5e-2
NOISIER = 3.0
"""How much farther a result may be from the exact one than another result that differs from it by rounding only."""
LARGE = 1e30
"""Numbers of this absolute value and above stand for infinity, as in masked logits."""


def relative_difference(want: Tensor, have: Tensor, *, floor: float = 1e-6) -> float:
    """Return the largest difference of two floating tensors, relative to the largest finite absolute value of ``want``.

    Args:
        want: the expected values.
        have: the actual values, of the same shape.
        floor: lower bound on the scale.

    Returns:
        Infinity if one tensor is finite where the other is infinite or NaN.
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


def compare(expected: object, actual: object, *, values: bool = True, coarse: bool = False) -> None:
    """Compare two output structures.

    Args:
        expected: what the original returns.
        actual: what the rewritten model returns.
        values: compare values, to float tolerance; False compares structures and shapes only.
        coarse: to the tolerance of half precision, whatever the dtype of an output: something before it had no more.

    Raises:
        RewriteError: they differ.
    """
    first, second = _by_path(expected), _by_path(actual)
    if first.keys() != second.keys() or type(expected) is not type(actual):
        raise RewriteError(
            f"the rewritten model returns {type(actual).__name__} with {len(second)} tensors, the original "
            f"{type(expected).__name__} with {len(first)}."
        )
    for position, (path, want) in enumerate(first.items()):
        have = second[path]
        if not isinstance(want, Tensor):
            if isinstance(want, (int, str)) and want != have:
                raise RewriteError(f"output {position} is {have} instead of {want}.")
            if (wanted := _texts(want)) != (found := _texts(have)):
                raise RewriteError(f"output {position} holds the texts {found} instead of {wanted}.")
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
        if error > (COARSE if coarse else RELATIVE.get(want.dtype, COARSE)):
            raise RewriteError(
                f"with pruning off, output {position} differs from the original's by {error:.1e} of its scale. The "
                "rewritten graph would be wrong, so it is refused; please report the model."
            )


def _texts(leaf: object) -> dict[str, str]:
    """The texts in the attributes of an object, which may tell of sizes."""
    attributes = getattr(leaf, "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) is str}


def rounds_alike(exact: object, original: object, rewritten: object) -> bool:
    """Return whether two results in single precision are about equally near to the exact one, output by output.

    Deep convolutions and badly scaled weights make a model round by more than the tolerance. Then no other order of summation
    can agree with it any better. Outputs that are within the tolerance of the exact ones are near enough however near the
    original's are.

    Args:
        exact: what the original returns in double precision.
        original: what the original returns.
        rewritten: what the rewritten model returns.
    """
    truth, first, second = (_by_path(result) for result in (exact, original, rewritten))
    if not truth.keys() == first.keys() == second.keys():
        return False
    for path, want in truth.items():
        if not isinstance(want, Tensor) or not want.dtype.is_floating_point or not want.numel():
            continue
        theirs, ours = first[path], second[path]
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            return False
        noise, error = relative_difference(want, theirs), relative_difference(want, ours)
        if not error <= max(NOISIER * noise, RELATIVE.get(ours.dtype, COARSE)):
            return False
    return True


def _by_path(output: object) -> dict[str, object]:
    """Leaves by their path, so that entries with names are compared by name, whatever their order."""
    try:
        return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(output)[0]}
    except ValueError:  # a container that was registered without names
        return {str(place): leaf for place, leaf in enumerate(pytree.tree_leaves(output))}
