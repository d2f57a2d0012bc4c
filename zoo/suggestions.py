"""Advice about names that are not known: :func:`did_you_mean`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str, cutoff: float = 0.5) -> str:
    """Return the known names nearest to ``name`` as a question, or ``otherwise`` where none is near.

    Args:
        name: What was asked for.
        known: Names that exist.
        otherwise: The advice where no name is near.
        cutoff: How similar a name must be, from 0 to 1 (see :func:`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else otherwise
