"""Pictures of what pruning keeps: a figure (PNG), a self-contained page (HTML), and a graph of blocks and streams.

:func:`show` draws what a model keeps of your own images (``survivors.py``). Behind it stands
:class:`~madtp.pictures.examples.Example`, the data of figure and page; ``figure.py`` and ``page.py`` lay it out. ``graph.py``
stands alone and draws the graph that ``madtp inspect`` shows.
"""

from __future__ import annotations

from madtp.pictures.examples import Example, KeptPatches, fade_dropped
from madtp.pictures.figure import draw_figure
from madtp.pictures.page import Measurement, write_page
from madtp.pictures.survivors import show, survivors

__all__ = ["Example", "Measurement", "KeptPatches", "draw_figure", "fade_dropped", "show", "survivors", "write_page"]
