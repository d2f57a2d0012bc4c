"""The ``madtp`` command: it parses options, calls the library, and prints.

Start in ``app.py``, which lists the commands; each has a file of its own. ``console.py`` holds what they share.
"""

from __future__ import annotations

from madtp.cli.app import main

__all__ = ["main"]
