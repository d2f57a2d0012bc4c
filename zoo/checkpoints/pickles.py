"""What a pickle or an archive asks for, found out without unpickling or unpacking it.

Start at :func:`check_file`. Unpicklers that run no foreign code still hash tuples that nest so deeply that the process dies,
and allocate what a small file claims. The checks walk through opcodes and the list of an archive's files.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from madtp.files.limits import DEEPEST, FREE_BYTES, MOST_EXPANSION, ExceededError, check_bytes

MOST_ITEMS = 1_000_000
"""Items of a tuple, with those of the tuples in it, as often as each occurs: what hashing it takes."""

LONGEST_NUMBER = 100
"""Bytes of a whole number, in binary or as text."""

LONGEST_GLOBAL = 1000
"""Bytes of the name of a class or function, with that of its module."""

LEGACY_PICKLES = 5
"""How many pickles stand one after the other in a file from before PyTorch 1.6."""

_ZIP = b"PK\x03\x04"
# What makes an object as large as the number that it is called with.
_SIZED = frozenset((b"__builtin__\nbytearray", b"builtins\nbytearray"))
# Called over and over, each of these codecs makes a text larger, and larger again.
_ENCODE = b"_codecs\nencode"
_GROWING = re.compile(r"(hex|base.?64|quopri|quoted.?printable|uu)(.?codec)?", re.IGNORECASE)


class _Value(NamedTuple):
    """What matters of an object on the stack of a pickle: tuples inside it."""

    depth: int = 0
    items: int = 1


class _Opcode(NamedTuple):
    """What an opcode does, as the table of :mod:`pickletools` says.

    Attributes:
        name: its name there.
        does: which of the cases of :func:`check_pickle` it is.
        width: bytes of its argument; where negative, the constant of :mod:`pickletools` that says how to tell.
        closes: whether it takes all objects behind the last mark, and the mark.
        taken: how many further objects it takes.
        made: how many plain objects it makes.
    """

    name: str
    does: str
    width: int
    closes: bool
    taken: int
    made: int


def _read(opcode: pickletools.OpcodeInfo) -> _Opcode:
    before, mark = opcode.stack_before, pickletools.markobject
    closes = mark in before
    taken = before.index(mark) if closes else len(before)
    width, made = opcode.arg.n if opcode.arg else 0, len(opcode.stack_after)
    does = _CASES.get(opcode.name) or ("push" if width >= 0 and not taken and not closes and made == 1 else "other")
    return _Opcode(opcode.name, does, width, closes, taken, made)


_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CASES = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), "put"),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), "get"),
    **dict.fromkeys(_TUPLES, "tuple"),
    **dict.fromkeys(("TUPLE", "FROZENSET"), "closed tuple"),
    **dict.fromkeys(("GLOBAL", "INST"), "global"),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), "number"),
    "MARK": "mark",
    "MEMOIZE": "memoize",
    "DUP": "dup",
    "STOP": "stop",
}
_OPCODES = {ord(opcode.code): _read(opcode) for opcode in pickletools.opcodes}
# Arguments that a length stands in front of: how many bytes the length has.
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PLAIN, _MARK = _Value(), _Value(-1, 0)


def check_file(path: Path) -> int:
    """Check every pickle of a file that ``torch.load`` or this package reads, and how far its archive unpacks.

    Returns:
        Bytes that the file holds, unpacked: no tensor in it takes more.

    Raises:
        ExceededError: it asks for more than the limits allow.
        ValueError: it holds no pickle.
        Exception: whatever :mod:`zipfile` raises where the file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = 0
                for _ in range(LEGACY_PICKLES):
                    end = check_pickle(content, end)
            return size
    with zipfile.ZipFile(path) as archive:
        held = check_archive(archive, size)
        for name in archive.namelist():
            if name.endswith(".pkl"):
                check_pickle(archive.read(name))
    return held


def check_archive(archive: zipfile.ZipFile, size: int) -> int:
    """Refuse an archive that unpacks to much more than its size, or holds a name twice.

    Args:
        archive: the archive.
        size: bytes of its file.

    Returns:
        Bytes of all that it holds, unpacked.
    """
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) != len(entries):
        raise ExceededError("it holds a name twice")
    total = sum(entry.file_size for entry in entries)
    check_bytes("what it holds, unpacked,", total, max(FREE_BYTES, MOST_EXPANSION * size))
    return total


def check_pickle(content: bytes | mmap.mmap, start: int = 0) -> int:
    """Walk through a pickle, and refuse what an unpickler should not be given.

    Args:
        content: holds the pickle.
        start: where it starts.

    Returns:
        Where it ends.

    Raises:
        ExceededError: it nests tuples too deeply, or makes objects of any size that it likes.
        ValueError: it is no pickle.
    """
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    place, done, encodes = start, 0, False
    while True:
        opcode = _OPCODES.get(content[place]) if place < len(content) else None
        if opcode is None:
            raise ValueError(f"at byte {place} it is no pickle")
        name, does, width, closes, taken, made = opcode
        first, place = (place + 1, place + 1 + width) if width >= 0 else _argument(content, place + 1, opcode)
        done += 1
        if does == "push":
            stack.append(_PLAIN)
        elif does == "put":
            number = content[first] if width == 1 else _number(content[first:place], opcode)
            if number > done:  # an unpickler makes room for as many as the largest number says
                raise ExceededError(f"its object {number} is numbered beyond all that it holds")
            memo[number] = stack[-1] if stack else _PLAIN
        elif does == "get":
            stack.append(memo.get(content[first] if width == 1 else _number(content[first:place], opcode), _PLAIN))
        elif does == "mark":
            stack.append(_MARK)
        elif does == "closed tuple":
            _join(stack, _last_mark(stack), marked=True)
        elif does == "tuple":
            _join(stack, len(stack) - _TUPLES[name])
        elif does == "memoize":
            memo[len(memo)] = stack[-1] if stack else _PLAIN
        elif does == "dup":
            stack.append(stack[-1] if stack else _PLAIN)
        else:
            if does == "global":
                if place - first > LONGEST_GLOBAL:  # torch looks through its name for longer than a reader should take
                    raise ExceededError(f"it names a class or function by {place - first} bytes")
                called = bytes(content[first:place]).rstrip(b"\n")
                encodes |= called == _ENCODE
                if called in _SIZED:
                    raise ExceededError(
                        f"it calls {called.decode().replace(chr(10), '.')}, whose result may be of any size"
                    )
            elif does == "number" and place - first > LONGEST_NUMBER:
                raise ExceededError(f"it holds a number of {place - first} bytes")
            if closes:
                del stack[_last_mark(stack) :]
            if taken:
                del stack[-taken:]
            if made:
                stack.append(_PLAIN)
            if does == "stop":
                break
    if encodes:
        _check_codecs(content[start:place])
    return place


def _argument(content: bytes | mmap.mmap, place: int, opcode: _Opcode) -> tuple[int, int]:
    """Where the argument of an opcode starts and ends that has no fixed width."""
    width = opcode.width
    if width == pickletools.UP_TO_NEWLINE:
        end = place
        for _ in range(1 + (opcode.does == "global")):
            end = content.find(b"\n", end) + 1
            if not end:
                raise ValueError(f"at byte {place} it ends within a line")
        return place, end
    first = place + _LENGTHS[width]
    return first, first + int.from_bytes(content[place:first], "little")


def _number(argument: bytes, opcode: _Opcode) -> int:
    return int(argument) if opcode.width < 0 else int.from_bytes(argument, "little")


def _check_codecs(content: bytes) -> None:
    """Refuse codecs that make a text larger."""
    for _, argument, _ in pickletools.genops(BytesIO(content)):
        if isinstance(argument, str) and _GROWING.fullmatch(argument):
            raise ExceededError(f"it encodes as {argument}, which makes texts larger")


def _last_mark(stack: list[_Value]) -> int:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            return place
    raise ValueError("it closes what it did not open")


def _join(stack: list[_Value], start: int, *, marked: bool = False) -> None:
    """Put a tuple in the place of the last objects, or of all behind a mark."""
    if start < 0:
        raise ValueError("it takes more than it holds")
    parts = stack[start + marked :]
    if all(part is _PLAIN for part in parts):
        stack[start:] = [_Value(1, 1 + len(parts))]
        return
    depth = 1 + max(part.depth for part in parts)
    items = 1 + sum(part.items for part in parts)
    if depth > DEEPEST or items > MOST_ITEMS:
        raise ExceededError(f"it nests tuples deeper than {DEEPEST} levels, or over and over")
    stack[start:] = [_Value(depth, items)]
