"""Whether a compiler follows the computation: :func:`is_compiling`, :func:`is_exporting`.

Fast paths that depend on values, such as leaving out a mask that hides nothing, are closed then: values are not known.
"""

from __future__ import annotations

import torch


def is_compiling() -> bool:
    """Return whether ``torch.export`` or ``torch.compile`` traces what runs now."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces what runs now, by running its Python."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
