"""From which checkpoint a run goes on, and whether it may: :func:`newest_whole`, :func:`check_config`."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from madtp.errors import CheckpointError
from madtp.processes import current
from madtp.saving.differences import differences
from madtp.training.checkpoint import DamagedCheckpointError, Stored, checkpoints, not_finite, open_checkpoint

log = logging.getLogger("madtp")

RESUME_ANYWAY = "--resume-anyway (resume_anyway=True)"
SHARES = "processes times accumulate"
"""What a config to compare calls the number of shares of a batch, on which random draws depend."""

FREE = ("tensorboard", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "accumulate")
"""Settings of the engine that cannot change what a run computes, or not by themselves."""


def newest_whole(folder: Path, unset: Collection[str] = ()) -> Stored | None:
    """Read the newest checkpoint that is whole, and warn of newer ones that are damaged.

    Args:
        folder: folder of all checkpoints of a run.
        unset: names of tensors that may hold NaN or infinite values.

    Returns:
        The checkpoint, or None where there is none at all.

    Raises:
        CheckpointError: all checkpoints are damaged, or one is newer than this code.
    """
    found = list(reversed(checkpoints(folder)))
    faults: list[str] = []
    for path in found:
        try:
            stored = open_checkpoint(path)
        except DamagedCheckpointError as error:
            faults.append(str(error))
            continue
        if poisoned := [name for name in not_finite(stored.tensors) if name not in unset]:
            faults.append(f"{path} holds NaN or infinite values in {poisoned[0]}")
            continue
        if faults and current().main:
            log.warning("%s; resuming from %s", "; ".join(faults), stored.path)
        return stored
    if not found:
        return None
    raise CheckpointError(
        f"no checkpoint in {folder} can be used: {'; '.join(faults)}. Remove the folder to start from the beginning."
    )


def check_config(stored: Stored, config: Mapping[str, object], steps: int, *, anyway: bool) -> None:
    """Compare the config of a run with the one that a checkpoint was written with.

    Args:
        stored: the checkpoint.
        config: what the run depends on, as :func:`madtp.training.checkpoint.write_checkpoint` takes it.
        steps: steps of the whole run.
        anyway: whether the run goes on with another config; the differences are logged.

    Raises:
        CheckpointError: they differ in what the result depends on, or the run is shorter than what is done.
    """
    if stored.step > steps:
        raise CheckpointError(
            f"{stored.path} is {stored.step} steps into its run, and training.steps is {steps}; give it more steps, or choose "
            "another output."
        )
    if stored.config is None:
        found = "comes from an older version of madtp, which stored no config to compare with"
    elif different := differences(stored.config, config, [f"training.{name}" for name in FREE]):
        found = f"was written with another config: {different}"
    else:
        return
    if not anyway:
        raise CheckpointError(
            f"{stored.path} {found}. Resume with the same config, choose another output, or accept the difference by "
            f"{RESUME_ANYWAY}."
        )
    if current().main:
        log.warning("%s %s; resuming anyway", stored.path, found)


def as_json(config: Mapping[str, object]) -> dict[str, object]:
    """Return a config as it comes back from a JSON file."""
    plain: dict[str, object] = json.loads(json.dumps(config, default=str))
    return plain
