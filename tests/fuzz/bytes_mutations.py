"""Mutations of bytes, of whatever format. See :data:`BYTES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .kinds import CHOICE, EARLY, PLACE, Kind, Whole

NUMBERS = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\n",
    b"\xff\xff",
    b"\x7f\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x10",
    b"\x10\0\0\0",
    b"\0\0\1\0",
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\0\0\0\0\1\0\0\0",
    b"\0\0\0\x80\0\0\0\0",
)
"""Lengths, offsets and counts at the limits of their types, in both orders of bytes."""

PIECES = (
    b"\0",
    b"\0" * 300,
    b"\xff" * 70_000,
    b"\xc3\x28",
    b"\xef\xbb\xbf",
    b"(" * 5000,
    b"[" * 100_000,
    b"PK\x03\x04",
    b" ",
)
"""What is inserted: nothing that text or numbers hold, byte order marks, brackets that nobody closes."""


class ContentMutation(Protocol):
    """A change of the content of a file."""

    def of(self, content: bytes, other: bytes) -> bytes:
        """Return the changed content; ``other`` is that of another file of the input."""


@dataclass(frozen=True)
class FlipBit:
    place: int
    bit: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return put(content, self.place, lambda old: bytes([old[0] ^ 1 << self.bit]), 1)


@dataclass(frozen=True)
class SetByte:
    place: int
    value: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return put(content, self.place, lambda old: bytes([self.value]), 1)


@dataclass(frozen=True)
class SetNumber:
    place: int
    number: int

    def of(self, content: bytes, other: bytes) -> bytes:
        number = NUMBERS[self.number % len(NUMBERS)]
        return put(content, self.place, lambda old: number, len(number))


@dataclass(frozen=True)
class Insert:
    place: int
    piece: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return put(content, self.place, lambda old: PIECES[self.piece % len(PIECES)], 0)


@dataclass(frozen=True)
class Delete:
    place: int
    count: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return put(content, self.place, lambda old: b"", self.count)


@dataclass(frozen=True)
class Truncate:
    place: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return content[: self.place % (len(content) + 1)]


@dataclass(frozen=True)
class Repeat:
    place: int
    count: int
    times: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return put(content, self.place, lambda old: old * self.times, self.count)


@dataclass(frozen=True)
class Splice:
    place: int
    source: int
    count: int

    def of(self, content: bytes, other: bytes) -> bytes:
        first = self.source % (len(other) + 1)
        return put(content, self.place, lambda old: other[first : first + self.count], self.count)


def put(content: bytes, place: int, new: object, count: int) -> bytes:
    """Replace ``count`` bytes at a place by what ``new`` makes of them; what is empty stays so."""
    if not content:
        return content
    first = place % len(content)
    old = content[first : first + count]
    assert callable(new)
    return content[:first] + (new(old) if old or not count else b"") + content[first + count :]


BYTES = tuple(
    Kind(make, (where, *ranges))
    for make, ranges in (
        (FlipBit, (Whole(0, 7),)),
        (SetByte, (Whole(0, 255),)),
        (SetNumber, (CHOICE,)),
        (Insert, (CHOICE,)),
        (Delete, (Whole(1, 64),)),
        (Truncate, ()),
        (Repeat, (Whole(1, 64), Whole(2, 200))),
        (Splice, (PLACE, Whole(1, 200))),
    )
    for where in (PLACE, EARLY)
)
