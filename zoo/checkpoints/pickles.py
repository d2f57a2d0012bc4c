"""What a pickle or an archive asks for, found out without unpickling or unpacking it.

Start at :func:`check_file`. Unpicklers that run no foreign code still hash tuples that nest so deeply that the process dies,
and allocate what a small file claims. The checks walk through opcodes and the list of an archive's files.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from madtp.files.limits import DEEPEST, MOST_EXPANSION, ExceededError, check_bytes

MOST_ITEMS = 1_000_000
"""Items of a tuple, with those of the tuples in it, as often as each occurs: what hashing it takes."""

LEGACY_PICKLES = 5
"""How many pickles stand one after the other in a file from before PyTorch 1.6."""

MOST_BITS = 256
"""Bits of a whole number."""

_ZIP = b"PK\x03\x04"
# What makes an object as large as the number that it is called with.
_SIZED = frozenset(("__builtin__ bytearray", "builtins bytearray"))
# Called over and over, each of these codecs makes a text larger, and larger again.
_ENCODE, _GROWING = "_codecs encode", re.compile(r"(hex|base.?64|quopri|quoted.?printable|uu)(.?codec)?", re.IGNORECASE)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_INTEGERS = frozenset(("INT", "LONG", "LONG1", "LONG4"))
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_MARK = pickletools.markobject


class _Value(NamedTuple):
    """What matters of an object on the stack of a pickle: tuples inside it."""

    depth: int = 0
    items: int = 1


_PLAIN, _MARKER = _Value(), _Value(-1, 0)


def check_pickle(file: IO[bytes]) -> None:
    """Read a pickle from a file, up to its end, and refuse what an unpickler should not be given.

    Raises:
        ExceededError: it nests tuples too deeply, or makes objects of any size that it likes.
        ValueError: it is no pickle.
    """
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    encodes = grows = False
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name in _PUTS:
            if argument > number:  # an unpickler makes room for as many as the largest number says
                raise ExceededError(f"its object {argument} is numbered beyond all that it holds")
            memo[argument] = stack[-1] if stack else _PLAIN
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else _PLAIN
        elif name in _GETS:
            stack.append(memo.get(argument, _PLAIN))
        elif name in _TUPLES:
            _join(stack, len(stack) - _TUPLES[name])
        elif name in ("TUPLE", "FROZENSET"):
            _join(stack, _last_mark(stack), marked=True)
        elif name == "DUP":
            stack.append(stack[-1] if stack else _PLAIN)
        else:
            _check_argument(name, argument)
            encodes |= argument == _ENCODE
            grows |= isinstance(argument, str) and _GROWING.fullmatch(argument) is not None
            _apply(stack, opcode)
    if encodes and grows:
        raise ExceededError(f"it calls {_ENCODE.replace(' ', '.')} with a codec that makes texts larger")


def check_file(path: Path) -> int:
    """Check every pickle of a file that ``torch.load`` or this package reads, and how far its archive unpacks.

    Returns:
        Bytes that the file holds, unpacked: no tensor in it takes more.

    Raises:
        ExceededError: it asks for more than the limits allow.
        Exception: whatever :mod:`zipfile` and :mod:`pickletools` raise where the file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                check_pickle(file)
            return size
    with zipfile.ZipFile(path) as archive:
        held = check_archive(archive, size)
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as pickled:
                    check_pickle(pickled)
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
    check_bytes("what it holds, unpacked,", total, MOST_EXPANSION * size)
    return total


def _check_argument(name: str, argument: object) -> None:
    if name in _INTEGERS and isinstance(argument, int) and argument.bit_length() > MOST_BITS:
        raise ExceededError(f"it holds a number of {argument.bit_length()} bits")
    if argument in _SIZED:
        raise ExceededError(f"it calls {str(argument).replace(' ', '.')}, whose result may be of any size")


def _apply(stack: list[_Value], opcode: pickletools.OpcodeInfo) -> None:
    """Do to the stack what an opcode does that makes no tuple."""
    taken = opcode.stack_before
    if pickletools.stackslice in taken or opcode.name == "POP_MARK":
        del stack[_last_mark(stack) :]
        taken = taken[: taken.index(_MARK)] if _MARK in taken else []
    if taken:
        del stack[-len(taken) :]
    stack.extend(_MARKER if made is _MARK else _PLAIN for made in opcode.stack_after)


def _last_mark(stack: list[_Value]) -> int:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARKER:
            return place
    raise ValueError("it closes what it did not open")


def _join(stack: list[_Value], start: int, *, marked: bool = False) -> None:
    """Put a tuple in the place of the last objects, or of all behind a mark."""
    if start < 0:
        raise ValueError("it takes more than it holds")
    parts = stack[start + marked :]
    depth = 1 + max((part.depth for part in parts), default=0)
    items = 1 + sum(part.items for part in parts)
    if depth > DEEPEST or items > MOST_ITEMS:
        raise ExceededError(f"it nests tuples deeper than {DEEPEST} levels, or over and over")
    stack[start:] = [_Value(depth, items)]
