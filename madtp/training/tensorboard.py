"""Numbers of a run for TensorBoard: :class:`TensorBoard`. Needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from madtp.errors import ConfigError


class TensorBoard:
    """Writes scalars below a folder, for ``tensorboard --logdir FOLDER``.

    Args:
        folder: folder of the run; the files go to its subfolder ``tensorboard``.
        start: number of steps done. Whatever an interrupted run wrote about later steps is discarded.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "training.tensorboard asks for TensorBoard, which is not installed; pip install 'madtp[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def show(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step as ``train/NAME``; a name with a slash is used as it is."""
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, done)

    def show_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a held-out evaluation as ``held out/NAME``."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"held out/{name}", value, done)

    def close(self) -> None:
        """Write everything to disk."""
        self._writer.close()
