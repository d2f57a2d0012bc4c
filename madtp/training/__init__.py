"""Training that can be interrupted: an engine that knows no model and no data set.

Start with :func:`madtp.training.run.train`, which reads a config file and runs the recipe that it names. The pieces:
``config.py`` (settings), ``engine.py`` (the loop), ``optim.py`` (optimiser and schedule), ``feed.py`` (batches made in
the background), ``checkpoint.py`` (safetensors and JSON, atomic), ``progress.py`` (numbers on screen).
"""

from __future__ import annotations

from madtp.training.config import TrainingConfig
from madtp.training.engine import Learner, TrainingResult, fit
from madtp.training.run import train

__all__ = ["TrainingConfig", "Learner", "TrainingResult", "fit", "train"]
