"""The report of a rewrite: what was found, where tokens are pruned and what that saves, which blocks are not pruned and why.

Start at :class:`RewriteReport` in ``records.py``. ``outline.py`` arranges it for a reader, ``text.py`` prints that,
and ``page.py`` makes HTML of it.
"""

from __future__ import annotations

from madtp.report.records import (
    BlockReport,
    RefusalReport,
    RewriteReport,
    Savings,
    SiteBalance,
    SiteReport,
    SiteTokens,
    StreamReport,
    UnprunedCalls,
)

__all__ = [
    "BlockReport",
    "RefusalReport",
    "RewriteReport",
    "Savings",
    "SiteBalance",
    "SiteReport",
    "SiteTokens",
    "StreamReport",
    "UnprunedCalls",
]
