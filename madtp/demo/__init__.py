"""The demonstration: it measures the shipped models side by side on held-out scenes, and draws what they keep.

Start at :func:`run_demo`. ``models.py`` loads the models, ``measure.py`` measures them, and ``table.py`` prints the table.
"""

from __future__ import annotations

from madtp.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
