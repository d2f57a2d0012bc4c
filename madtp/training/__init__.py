"""Training that can be interrupted and resumed: an engine that knows no model and no data set.

It takes a config file and writes checkpoints and a finished model. Start with :func:`madtp.training.run.train`, which runs
the recipe that the config names.

- ``config.py``: settings of a run
- ``engine.py``: the loop; ``batch_shares.py`` divides its batches over processes, ``prefetch.py`` makes them ahead
- ``optim.py``, ``precision.py``, ``attention_kernels.py``: optimisers, number formats, fast backward
- ``compression.py``: what steers a pruned model to a compute budget
- ``checkpoint.py``, ``progress.py``, ``tensorboard.py``: files and numbers
"""

from __future__ import annotations

from madtp.training.config import TrainingConfig
from madtp.training.engine import Learner, TrainingResult, fit
from madtp.training.run import train

__all__ = ["TrainingConfig", "Learner", "TrainingResult", "fit", "train"]
