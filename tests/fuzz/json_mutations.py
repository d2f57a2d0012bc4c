"""Mutations of values and names in JSON, wherever a file holds it. See :data:`JSON` and :class:`InJson`.

A mutation sees a tree: numbers and odd values are kept as their text (:class:`Raw`), and objects as pairs, so that a key may
occur twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .kinds import CHOICE, PLACE, Kind, Whole

HEADER_LENGTH = 8
"""Bytes of the length in front of the JSON of a safetensors file."""


@dataclass(frozen=True)
class Raw:
    """A value as the text that stands for it, JSON or not."""

    text: str


class Pairs(list[Any]):
    """An object as a list of ``[name, value]``."""


VALUES = tuple(
    Raw(text)
    for text in (
        *(
            "null",
            "true",
            "false",
            "0",
            "1",
            "-1",
            "2",
            "0.5",
            "-0.0",
            "1e-320",
            "1e400",
            "-1e400",
            "NaN",
            "Infinity",
            "nan",
        ),
        *(
            "127",
            "256",
            "65536",
            "2147483647",
            "2147483648",
            "-2147483649",
            "9223372036854775807",
            "9223372036854775808",
        ),
        *("18446744073709551616", "1" + "0" * 400, "7" * 5000, "1e3", "100000000", "1.0"),
        *('""', '" "', '"a"', '"1"', '"../a"', '"/"', '"."', r'"a\u0000b"', r'"\ud800"', '"\u00e9\u4e2d"', r'"\u2028"'),
        *(f'"{"a" * 300}"', f'"{"b/" * 3000}"', '"nan"', '"float32"', '"float64"', '"int8"', '"bool"', '"complex64"'),
        *('"F64"', '"I64"', '"BF16"', '"F8_E4M3"', '"BOOL"', '"U8"', '"Tensor"', '"__class__"', '"%s{0}"'),
        *(
            "[]",
            "{}",
            "[[]]",
            "[0]",
            "[1,2,3]",
            "[-1]",
            "[2147483647,2147483647]",
            '["a"]',
            '{"a":1}',
            '{"":null}',
            "[null]",
        ),
        *("[" * 70 + "]" * 70, "[" * 50_000 + "]" * 50_000, '{"a":' * 70 + "1" + "}" * 70, "", "'a'", "[1", "\x00"),
    )
)
"""What takes the place of a value: all types, numbers beyond those of machines, odd texts, deep nests, and what is no JSON."""

NAMES = ("", "a", "name", "version", "__class__", "madtp.x", "a.b", "\ud800", "\0", "c" * 300, "d" * 2000, "0", "é")
"""What takes the place of a name."""


def parse(text: str) -> Any:
    """Return the tree of a JSON text.

    Raises:
        ValueError: it is none, or nests too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_int=Raw, parse_float=Raw, parse_constant=Raw)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def _pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs([list(pair) for pair in pairs])


def written(tree: Any) -> str:
    """Return the text of a tree."""
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{written(value)}" for name, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return tree.text if isinstance(tree, Raw) else json.dumps(tree)


@dataclass(eq=False)
class Slot:
    """A place of a tree that holds a value.

    Attributes:
        owner: the list or object that it is in.
        number: which of its items.
    """

    owner: Any
    number: int

    @property
    def value(self) -> Any:
        item = self.owner[self.number]
        return item[1] if isinstance(self.owner, Pairs) else item

    @value.setter
    def value(self, new: Any) -> None:
        if isinstance(self.owner, Pairs):
            self.owner[self.number] = [self.owner[self.number][0], new]
        else:
            self.owner[self.number] = new


def slots(tree: Any) -> list[Slot]:
    """Return all places of a tree, the tree itself as the only item of a list first."""
    found, waiting = [], [[tree]]
    while waiting:
        owner = waiting.pop()
        for number in range(len(owner)):
            slot = Slot(owner, number)
            found.append(slot)
            if isinstance(slot.value, list):
                waiting.append(slot.value)
    return found


class TreeMutation(Protocol):
    """A change of a tree."""

    def at(self, all_slots: list[Slot]) -> None:
        """Change the tree of these places; the first holds the tree itself."""


@dataclass(frozen=True)
class Replace:
    place: int
    value: int

    def at(self, all_slots: list[Slot]) -> None:
        all_slots[self.place % len(all_slots)].value = VALUES[self.value % len(VALUES)]


@dataclass(frozen=True)
class Remove:
    place: int

    def at(self, all_slots: list[Slot]) -> None:
        slot = all_slots[self.place % len(all_slots)]
        if slot is not all_slots[0]:
            del slot.owner[slot.number]


@dataclass(frozen=True)
class Add:
    """An item more: in an object under a name of the table, or under one that is there."""

    place: int
    name: int
    value: int

    def at(self, all_slots: list[Slot]) -> None:
        slot = all_slots[self.place % len(all_slots)]
        owner, new = slot.owner, VALUES[self.value % len(VALUES)]
        if slot is all_slots[0]:
            return
        if isinstance(owner, Pairs):
            known = (*NAMES, owner[slot.number][0])
            owner.append([known[self.name % len(known)], new])
        else:
            owner.append(new)


@dataclass(frozen=True)
class Rename:
    place: int
    name: int

    def at(self, all_slots: list[Slot]) -> None:
        slot = all_slots[self.place % len(all_slots)]
        if isinstance(slot.owner, Pairs):
            known = (*NAMES, *(name for name, _ in slot.owner))
            slot.owner[slot.number] = [known[self.name % len(known)], slot.value]


@dataclass(frozen=True)
class Copy:
    """The value of another place."""

    place: int
    source: int

    def at(self, all_slots: list[Slot]) -> None:
        copied = parse(written(all_slots[self.source % len(all_slots)].value))
        all_slots[self.place % len(all_slots)].value = copied


@dataclass(frozen=True)
class Exchange:
    place: int
    other: int

    def at(self, all_slots: list[Slot]) -> None:
        one, two = (all_slots[place % len(all_slots)] for place in (self.place, self.other))
        texts = written(one.value), written(two.value)
        one.value = Raw(texts[1])
        two.value = Raw(texts[0])


@dataclass(frozen=True)
class Double:
    """An item twice, in an object under the same name."""

    place: int

    def at(self, all_slots: list[Slot]) -> None:
        slot = all_slots[self.place % len(all_slots)]
        if slot is not all_slots[0]:
            slot.owner.insert(slot.number, slot.owner[slot.number])


@dataclass(frozen=True)
class Wrap:
    place: int
    depth: int

    def at(self, all_slots: list[Slot]) -> None:
        slot = all_slots[self.place % len(all_slots)]
        slot.value = Raw("[" * self.depth + written(slot.value) + "]" * self.depth)


JSON = (
    *[Kind(Replace, (PLACE, CHOICE))] * 4,
    Kind(Remove, (PLACE,)),
    Kind(Add, (PLACE, CHOICE, CHOICE)),
    Kind(Rename, (PLACE, CHOICE)),
    Kind(Copy, (PLACE, PLACE)),
    Kind(Exchange, (PLACE, PLACE)),
    Kind(Double, (PLACE,)),
    Kind(Wrap, (PLACE, Whole(1, 3))),
    Kind(Wrap, (PLACE, Whole(50, 80))),
)


@dataclass(frozen=True)
class InJson:
    """A mutation of a whole file of JSON."""

    mutation: TreeMutation

    def of(self, content: bytes, other: bytes) -> bytes:
        return mutated_text(content, self.mutation)


@dataclass(frozen=True)
class InLine:
    """A mutation of one line of a file with a JSON value on each."""

    line: int
    mutation: TreeMutation

    def of(self, content: bytes, other: bytes) -> bytes:
        lines = content.split(b"\n")
        place = self.line % len(lines)
        lines[place] = mutated_text(lines[place], self.mutation)
        return b"\n".join(lines)


@dataclass(frozen=True)
class InHeader:
    """A mutation of the JSON in front of a safetensors file, whose length is kept right."""

    mutation: TreeMutation

    def of(self, content: bytes, other: bytes) -> bytes:
        end = HEADER_LENGTH + int.from_bytes(content[:HEADER_LENGTH], "little")
        header = mutated_text(content[HEADER_LENGTH:end], self.mutation)
        return len(header).to_bytes(HEADER_LENGTH, "little") + header + content[end:]


def mutated_text(content: bytes, mutation: TreeMutation) -> bytes:
    """Return JSON with a mutation; what is no JSON any more stays as it is."""
    try:
        tree = parse(content.decode())
    except ValueError:
        return content
    all_slots = slots(tree)
    mutation.at(all_slots)
    return written(all_slots[0].value).encode("utf-8", "surrogatepass")


Maker = Callable[..., InJson | InLine | InHeader]
