"""Texts that a model tokenises itself: calls that hold a string for each sample.

Start at :func:`holds_texts`. In a capture of the whole model their token ids would be constants, so every call with other texts
would be captured anew; regions are given the ids, or what was computed from them, as inputs.
"""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from madtp.calls.call import Call


def holds_texts(call: Call) -> bool:
    """Whether a call holds a list of strings, one for each sample."""
    values = pytree.tree_leaves((call.args, call.kwargs), is_leaf=_is_texts)
    return any(_is_texts(value) and len(value) == call.samples() for value in values)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
