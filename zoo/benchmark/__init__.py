"""What ``madtp bench`` runs: models with batches for them, and the variants of a model that are compared.

Start at :func:`~zoo.benchmark.measuring.measure` (``measuring.py``). ``models.py`` finds a model and its batches, with the
``pictures.py`` that models with random weights look at. ``variants.py`` is the table of variants; ``bench.py`` holds what they
share, such as rewritten models. The floor of a model's time is in ``packed_rows.py``, ``packed_vision.py`` and
``packed_reasoning.py``, chosen by ``floor.py``.

:func:`~zoo.benchmark.generation.measure_generation` (``generation.py``) measures models that generate. ``generators.py`` builds
them with their prompts, and ``continuing.py`` times the prefill and the steps.
"""

from __future__ import annotations

from zoo.benchmark.generation import GenerationSettings, measure_generation
from zoo.benchmark.generators import list_generators
from zoo.benchmark.measuring import BenchmarkSettings, measure
from zoo.benchmark.variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "BenchmarkSettings",
    "GenerationSettings",
    "Variant",
    "list_generators",
    "measure",
    "measure_generation",
]
