"""The demonstration: the shipped models measured side by side on held-out scenes, and a picture of what they keep.

Start at :func:`run_demo`; `models.py` loads, `measure.py` measures, `table.py` prints.
"""

from __future__ import annotations

from madtp.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
