"""Whether a compiler follows the computation: :func:`is_compiling`.

Fast paths that depend on values, such as leaving out a mask that hides nothing, are closed then: values are not known.
"""

from __future__ import annotations

import torch


def is_compiling() -> bool:
    """Return whether ``torch.export`` or ``torch.compile`` traces what runs now."""
    return torch.compiler.is_compiling()
