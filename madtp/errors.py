"""Exceptions of the library.

Every error says what was found, where, and what to do about it. All derive from :class:`MadtpError`, so a caller can
catch the library's refusals in one place without hiding bugs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madtp.report import RefusalReport


class MadtpError(Exception):
    """Base of every error that the library raises on purpose."""


class ExampleInputsError(MadtpError):
    """The example inputs do not fit the model, or their batch is too small to tell batch from other axes."""


class CaptureError(MadtpError):
    """The model could not be captured as a graph."""


class RewriteError(MadtpError):
    """The graph cannot be rewritten correctly."""


class ContinuationError(MadtpError):
    """A call reads a key/value cache that a pruned call filled, and no program can be made for it."""


class ExportError(MadtpError):
    """The model cannot leave Python: it has to be frozen first, or something in it depends on values."""


class NoSiteError(RewriteError):
    """No place was found in the model where tokens could be pruned."""


class NothingToPruneError(NoSiteError):
    """Attention was found, but none of it runs over tokens that could become fewer; leaving it alone loses nothing."""


class LeftAloneError(NoSiteError):
    """Only text of a language model could be pruned, which is left alone unless ``towers`` asks for it.

    Attributes:
        refusals: Why each block was not pruned.
    """

    def __init__(self, message: str, refusals: Sequence[RefusalReport] = ()) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)

    @property
    def by_policy(self) -> bool:
        """Whether every block was left alone by choice: each of them could be pruned."""
        return bool(self.refusals) and all(refusal.by_policy for refusal in self.refusals)


class UnprunedError(RewriteError):
    """Something is not pruned, and the configuration is strict."""


class PlanError(MadtpError):
    """A plan is malformed or does not belong to the graph."""


class ConfigError(MadtpError, ValueError):
    """A configuration value is out of range or contradicts another."""


class ArgumentError(MadtpError, TypeError):
    """An argument is of the wrong kind, such as a path where a model is asked for."""


class CheckpointError(MadtpError):
    """A file or folder is damaged, foreign, too new, or belongs to another model."""


class UnwritableError(CheckpointError, OSError):
    """A file or folder cannot be written: the disk is full, or the place is taken or not ours; the message says what to do."""


class CalibrationError(MadtpError):
    """The reduction that was asked for cannot be reached; the message says what can."""


class UnknownModelError(MadtpError, KeyError):
    """A name is not in the zoo; the message lists near matches."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DataError(MadtpError):
    """A data set is missing, damaged or asked for something it does not hold."""


class OutputInUseError(MadtpError):
    """Another process writes to the same output; the message names it."""


class TrainingError(MadtpError):
    """Training cannot go on; the message says from where it can be resumed."""
