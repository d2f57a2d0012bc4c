"""Names and what they stand for: :class:`Registry`, of which models, adapters and data sets each have one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from madtp.errors import ConfigError, MadtpError
from zoo.suggestions import did_you_mean

Entry = TypeVar("Entry")

SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""What models and data sets are called: lower-case words and digits, joined by underscores."""


class Registry(Mapping[str, Entry]):
    """Entries by name. A name is given once, and a name that is not known raises an error with near matches.

    Args:
        kind: what an entry is, for messages: "model".
        names: the pattern that every name matches as a whole.
        advice: how to choose a name that matches, for messages.
        unknown: the error for a name that is not known.
    """

    def __init__(self, kind: str, *, names: re.Pattern[str], advice: str, unknown: type[MadtpError]) -> None:
        self._kind, self._names, self._advice, self._unknown = kind, names, advice, unknown
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry.

        Raises:
            ConfigError: The name is taken or malformed.
        """
        if not self._names.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a {self._kind}: {self._advice}.")
        if name in self._entries:
            raise ConfigError(f"The {self._kind} {name!r} is registered already; choose another name.")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an entry."""
        del self._entries[name]

    def find(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            MadtpError: No such name, in the registry's own class of errors; the message lists near matches.
        """
        if name in self._entries:
            return self._entries[name]
        advice = did_you_mean(name, self._entries, otherwise=f"Known {self._kind}s: {', '.join(self.matching())}.")
        raise self._unknown(f"The zoo has no {self._kind} {name!r}. {advice}")

    def matching(self, pattern: str = "") -> list[str]:
        """Return the names that match a shell-style pattern, sorted; all of them for an empty pattern."""
        return sorted(name for name in self._entries if not pattern or fnmatchcase(name, pattern))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
