"""What becomes of an attempt: :class:`Bench` changes an input, has it read, and gives a :class:`Verdict`."""

from __future__ import annotations

import shutil
import time
import traceback
import warnings
from pathlib import Path

import torch
from peak_memory import peak_bytes, restart_peak
from torch import Tensor

from madtp.errors import MadtpError

from .changes import Attempt, apply
from .reading import Case, Reader, WrongError
from .verdicts import ALLOWED, EXCEPTION, LARGE, LOADED, REFUSED, SLOW, STANDARD, WRONG, Limits, Verdict


class Bench:
    """A reader at work on one input, which is changed and put back for every attempt.

    Args:
        reader: what reads.
        folder: is made, and holds the input in a folder below it.
        limits: for each attempt.
    """

    def __init__(self, reader: Reader, folder: Path, limits: Limits = STANDARD) -> None:
        self.reader, self.limits = reader, limits
        self.input = folder / "input"
        self._open()

    def _open(self) -> None:
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir(parents=True)
        self.case: Case = self.reader.open(self.input)
        self.files = [self.input / name for name, _ in self.case.files]
        self.formats = [name for _, name in self.case.files]
        self._content = {path: path.read_bytes() for path in sorted(self.input.rglob("*")) if path.is_file()}
        self._state = _copy(self.case)

    def prepare(self, attempt: Attempt) -> bool:
        """Put the input back, and change it.

        Returns:
            Whether its hashes were made right again.
        """
        shutil.rmtree(self.input, ignore_errors=True)
        for path, content in self._content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apply(attempt, self.files)
        if not attempt.sealed or self.case.seal is None:
            return False
        try:
            self.case.seal(self.input)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False  # there is nothing left to seal
        return True

    def judge(self, attempt: Attempt) -> Verdict:
        """Read a changed input, and tell what becomes of it."""
        sealed = self.prepare(attempt)
        verdict = self._read(sealed)
        self._restore()
        return verdict

    def _read(self, sealed: bool) -> Verdict:
        kind, message, where = LOADED, "", ""
        restart_peak()
        before, began = peak_bytes(), time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.case.check(self.case.read(self.input), sealed)
        except MadtpError as error:
            kind, message = REFUSED, str(error)
            if not _same(_copy(self.case), self._state):
                kind, message = WRONG, f"the model is changed, although it was refused: {error}"
        except WrongError as error:
            kind, message = WRONG, str(error)
        except Exception as error:
            kind, message, where = EXCEPTION, f"{type(error).__name__}: {error}", _place(error)
        seconds, grown = time.perf_counter() - began, peak_bytes() - before
        if kind in ALLOWED and seconds > self.limits.seconds:
            kind, message = SLOW, f"it took {seconds:.1f} s. {message}"
        if kind in ALLOWED and grown > self.limits.bytes:
            kind, message = LARGE, f"it took {grown >> 20} MiB. {message}"
        return Verdict(kind, message[:500], where, seconds, max(0, grown))

    def _restore(self) -> None:
        """Put the model back."""
        state = self.case.state()
        if state.keys() != self._state.keys() or any(
            state[name].shape != one.shape for name, one in self._state.items()
        ):
            self._open()
            return
        with torch.no_grad():
            for name, value in self._state.items():
                state[name].copy_(value)


def _copy(case: Case) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in case.state().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def _place(error: BaseException) -> str:
    """Where an exception was raised, and which line of the project's own led there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(f"/{name}/" in frame.filename for name in ("madtp", "zoo", "rewriters"))]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (*own[-1:], frames[-1]))
