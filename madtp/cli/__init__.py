"""The `madtp` command. Start reading in `app.py`, which lists the commands; each has a file of its own."""

from __future__ import annotations

from madtp.cli.app import main

__all__ = ["main"]
