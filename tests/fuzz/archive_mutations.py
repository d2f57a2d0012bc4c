"""Mutations of zip archives, as ``torch.save`` writes them, whose checksums stay right. See :data:`ARCHIVE`."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from .bytes_mutations import BYTES, ContentMutation
from .kinds import CHOICE, PLACE, Kind, Whole

Members = list[tuple[str, bytes]]

NAMES = (
    "",
    "a",
    "/a",
    "../a",
    "m/data.pkl",
    "data.pkl",
    "m/constants.pkl",
    "m/version",
    "b" * 300,
    "é",
    "m/data/0",
    "m/",
)


@dataclass(frozen=True)
class InMember:
    """A mutation of the content of a member."""

    member: int
    mutation: ContentMutation

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(content, self.member, lambda name, data: [(name, self.mutation.of(data, other))])


@dataclass(frozen=True)
class RenameMember:
    member: int
    name: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(content, self.member, lambda name, data: [(NAMES[self.name % len(NAMES)], data)])


@dataclass(frozen=True)
class RepeatMember:
    member: int
    times: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(content, self.member, lambda name, data: [(name, data)] * self.times)


@dataclass(frozen=True)
class CopyMember:
    """The content of another member."""

    member: int
    source: int

    def of(self, content: bytes, other: bytes) -> bytes:
        members = _members(content)
        if not members:
            return content
        copied = members[self.source % len(members)][1]
        return _changed(content, self.member, lambda name, data: [(name, copied)])


@dataclass(frozen=True)
class Swell:
    """A member that unpacks to zeros without end."""

    member: int
    megabytes: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(
            content, self.member, lambda name, data: [(name, data + bytes(self.megabytes << 20))], packed=True
        )


def _members(content: bytes) -> Members:
    """Names and contents of the members; none of what is no archive, or a damaged one."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # zipfile raises whatever it trips over, after an earlier mutation
        return []


def _changed(content: bytes, member: int, new: Callable[[str, bytes], Members], *, packed: bool = False) -> bytes:
    members = _members(content)
    if not members:
        return content
    place = member % len(members)
    members[place : place + 1] = new(*members[place])
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that are there twice
        with zipfile.ZipFile(
            target, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED, compresslevel=1
        ) as archive:
            for name, data in members:
                archive.writestr(name or "a", data)  # an earlier mutation may have left a name empty
    return target.getvalue()


ARCHIVE = (
    *[Kind(InMember, (CHOICE,), BYTES)] * 14,
    *[Kind(RenameMember, (CHOICE, CHOICE))] * 3,
    *[Kind(RepeatMember, (CHOICE, Whole(0, 2)))] * 3,
    *[Kind(CopyMember, (CHOICE, PLACE))] * 3,
    Kind(Swell, (CHOICE, Whole(60, 70))),
)
