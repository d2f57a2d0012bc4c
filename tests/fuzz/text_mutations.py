"""Mutations of lines of text: of vocabularies, and of settings in TOML. See :data:`LINES`."""

from __future__ import annotations

from dataclasses import dataclass

from .kinds import CHOICE, PLACE, Kind, Whole

TEXTS = (
    *(
        b"",
        b" ",
        b"[PAD]",
        b"[SEP]",
        b"##",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b"a" * 5000,
        b"\r",
        b"\0",
        b"1",
        b"-1",
    ),
    *(
        b"0",
        b"0x7fffffffffffffff",
        b"9" * 400,
        b"9" * 5000,
        b"1e400",
        b"nan",
        b"-inf",
        b"0.5",
        b"true",
        b'""',
        b'"a"',
        b"'a'",
    ),
    *(
        b"[]",
        b"{}",
        b"[" * 70 + b"]" * 70,
        b"[" * 50_000,
        b"{a=1}",
        b"1979-05-27",
        b'"""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"."',
    ),
    *(b'".a"', b'"a..b"', b'"zoo"', b'"zoo.recipes"', b'"madtp.__main__x"', b'"a\\u0000b"', b'"nothing.at.all"', b"#"),
)
"""What takes the place of a line, or of what stands behind its equals sign."""


@dataclass(frozen=True)
class SetLine:
    line: int
    text: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(content, self.line, lambda old: [TEXTS[self.text % len(TEXTS)]])


@dataclass(frozen=True)
class SetValue:
    line: int
    text: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def new(old: bytes) -> list[bytes]:
            name, equals, _ = old.partition(b"=")
            return [name + equals + TEXTS[self.text % len(TEXTS)] if equals else old]

        return _changed(content, self.line, new)


@dataclass(frozen=True)
class SetName:
    line: int
    text: int

    def of(self, content: bytes, other: bytes) -> bytes:
        def new(old: bytes) -> list[bytes]:
            _, equals, value = old.partition(b"=")
            return [TEXTS[self.text % len(TEXTS)] + equals + value if equals else old]

        return _changed(content, self.line, new)


@dataclass(frozen=True)
class RepeatLine:
    line: int
    times: int

    def of(self, content: bytes, other: bytes) -> bytes:
        return _changed(content, self.line, lambda old: [old] * self.times)


@dataclass(frozen=True)
class SwapLines:
    line: int
    other: int

    def of(self, content: bytes, other: bytes) -> bytes:
        lines = content.split(b"\n")
        one, two = self.line % len(lines), self.other % len(lines)
        lines[one], lines[two] = lines[two], lines[one]
        return b"\n".join(lines)


def _changed(content: bytes, line: int, new: object) -> bytes:
    lines = content.split(b"\n")
    place = line % len(lines)
    assert callable(new)
    lines[place : place + 1] = new(lines[place])
    return b"\n".join(lines)


LINES = (
    Kind(SetLine, (PLACE, CHOICE)),
    *[Kind(SetValue, (PLACE, CHOICE))] * 3,
    Kind(SetName, (PLACE, CHOICE)),
    Kind(RepeatLine, (PLACE, Whole(0, 3))),
    Kind(SwapLines, (PLACE, PLACE)),
)
