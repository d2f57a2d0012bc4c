"""Pictures of what pruning keeps: a figure (PNG) and a self-contained page (HTML).

Start at :class:`~madtp.pictures.examples.Example`, the data that both draw; `figure.py` and `page.py` only lay it out.
"""

from __future__ import annotations

from madtp.pictures.examples import Example, Survival, fade_dropped
from madtp.pictures.figure import draw_figure
from madtp.pictures.page import Measurement, write_page

__all__ = ["Example", "Measurement", "Survival", "draw_figure", "fade_dropped", "write_page"]
