"""References in docstrings become links: ``:func:`~madtp.tuning.freezing.freeze``` is a link to the entry of ``freeze``.

An extension of griffe, which reads the docstrings for the API reference. A name that has no entry stays code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc|obj):`(~?)\.?([\w.]+)`")
PACKAGES = ("madtp", "rewriters", "zoo")


class SphinxRoles(griffe.Extension):
    """Replaces roles by references that may stay unresolved."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda found: reference(obj, found[2], bool(found[1])), obj.docstring.value)


def reference(obj: griffe.Object, name: str, last: bool) -> str:
    """Return the HTML of a reference.

    Args:
        obj: whose docstring holds it.
        name: what it names, as written.
        last: whether only the last part of the name is shown.
    """
    shown = name.rpartition(".")[2] if last else name
    return f'<autoref identifier="{path_of(obj, name)}" optional><code>{shown}</code></autoref>'


def path_of(obj: griffe.Object, name: str) -> str:
    """Return the full path of a name that a docstring uses: a member of the object, or what its scopes know."""
    head, _, rest = name.partition(".")
    if head in PACKAGES:
        return name
    owner: griffe.Object | None = obj
    while owner is not None:
        if head in owner.members:
            member = owner.members[head]
            path = member.target_path if member.is_alias else member.path
            return f"{path}.{rest}" if rest else path
        owner = owner.parent
    return name
