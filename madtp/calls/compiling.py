"""Whether a compiler follows the computation: :func:`is_compiling`, :func:`is_exporting`.

Fast paths that depend on values, such as leaving out a mask that hides nothing, are closed then: values are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def is_compiling() -> bool:
    """Return whether ``torch.export`` or ``torch.compile`` traces what runs now."""
    if torch.compiler.is_dynamo_compiling():
        return True
    # An export sets a flag of the whole process; only the thread that exports computes with fake tensors.
    return torch.compiler.is_compiling() and detect_fake_mode() is not None


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces what runs now, by running its Python."""
    return is_compiling() and not torch.compiler.is_dynamo_compiling()


def has_free_sizes(leaves: Sequence[object]) -> bool:
    """Whether a compiler has left sizes of tensors free."""
    return any(isinstance(size, torch.SymInt) for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape)
