"""Numbers of a run as TensorBoard reads them: :class:`TensorBoard`. Needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from madtp.errors import ConfigError


class TensorBoard:
    """Writes scalars below a folder, for `tensorboard --logdir FOLDER`.

    Args:
        folder: of the run; the files go to its subfolder `tensorboard`.
        start: steps done; what an earlier, interrupted run wrote about later ones is discarded.

    Raises:
        ConfigError: TensorBoard is not installed.
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
        """Write the metrics of a step: `train/NAME`, or the name alone where it has a slash."""
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, done)

    def show_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write a held-out evaluation: `held out/NAME`."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"held out/{name}", value, done)

    def close(self) -> None:
        """Write all to disk."""
        self._writer.close()
