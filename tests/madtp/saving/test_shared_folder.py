"""A model folder is whole at every moment, whoever saves into it, reads it, or is killed meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from shared_folder import SAVES, WRITERS, read, run_rounds, save

from madtp.errors import CheckpointError, UnwritableError
from madtp.saving import model_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_rounds(folder: Path, rounds: int) -> None:
    outcome = run_rounds(folder, rounds)
    assert not outcome.failures
    assert outcome.saves == WRITERS * SAVES * rounds
    assert outcome.reads > rounds


@pytest.mark.slow
def test_two_writers_and_three_readers_share_a_folder(tmp_path: Path) -> None:
    check_rounds(tmp_path / "model", 20)


@pytest.mark.heavy
def test_two_writers_and_three_readers_share_a_folder_for_long(tmp_path: Path) -> None:
    check_rounds(tmp_path / "model", 1000)


@pytest.mark.parametrize("place", ["_read_tensors", "read_safetensors", "_sha256"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_model_that_is_replaced_while_it_is_read_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, times: int
) -> None:
    """Each save removes the tensors that the reader has just heard of."""
    folder = tmp_path / "model"
    save(folder, 0.0)
    step, values = getattr(model_folder, place), iter(range(1, times + 1))

    def replaced(*given: Any) -> Any:
        if (value := next(values, None)) is not None:
            with monkeypatch.context() as patch:
                patch.setattr(model_folder, place, step)
                save(folder, float(value))
        return step(*given)

    monkeypatch.setattr(model_folder, place, replaced)
    assert read(folder) in (0.0, times)


def test_a_model_that_is_replaced_and_comes_back_while_it_is_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save(folder, 1.0)
    step = model_folder._read_tensors

    def replaced(*given: Any) -> Any:
        monkeypatch.setattr(model_folder, "_read_tensors", step)
        save(folder, 2.0)
        try:
            return step(*given)
        finally:
            save(folder, 1.0)

    monkeypatch.setattr(model_folder, "_read_tensors", replaced)
    assert read(folder) == 1.0


def test_a_folder_that_stays_damaged_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 0.0)
    next(tmp_path.glob("model-*")).unlink()
    reads: list[int] = []
    step = model_folder._read_tensors
    monkeypatch.setattr(model_folder, "_read_tensors", lambda *given: (reads.append(1), step(*given))[1])
    with pytest.raises(CheckpointError, match=r"lacks model-\w+\.safetensors"):
        read(tmp_path)
    assert len(reads) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folders")
def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems of a network: a second writer may come between any two steps of the first."""

    def refuse(*given: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        for value in (1.0, 2.0, 3.0):
            save(tmp_path, value)
            assert read(tmp_path) == value
    assert len(names(tmp_path)) == 4
    save(tmp_path, 4.0)
    assert len(names(tmp_path)) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no folders")
def test_a_process_that_is_forked_meanwhile_does_not_keep_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, children = model_folder.publish, []

    def forking(*given: Path) -> None:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        children.append(child)
        publish(*given)

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "publish", forking)
        save(tmp_path, 1.0)
    try:
        save(tmp_path, 2.0)
        assert children[0].is_alive()
    finally:
        children[0].kill()
    assert read(tmp_path) == 2.0


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = ["model-00001-of-00002.safetensors", "model.safetensors", "model-best.safetensors", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    save(tmp_path, 1.0)
    save(tmp_path, 2.0)
    assert set(others) < set(names(tmp_path))
    assert len(names(tmp_path)) == len(others) + 2


@pytest.mark.parametrize("fails_at", [1, 2], ids=["tensors", "configuration"])
@pytest.mark.parametrize("there", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, there: bool, fails_at: int
) -> None:
    folder = tmp_path / "runs" / "model"
    if there:
        save(folder, 1.0)
    before = names(folder) if there else []
    step, calls = getattr(os, call), iter(range(1, 100))

    def full(*given: Any) -> Any:
        is_file = call == "replace" or stat.S_ISREG(os.fstat(given[0]).st_mode)
        if is_file and next(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UnwritableError, match=r"No space left on device.*free space there"):
            save(folder, 2.0)
    if there:
        assert read(folder) == 1.0
        assert names(folder) == before
    else:
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_killed_writers_leave_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    draw, context = random.Random(7), multiprocessing.get_context("fork")
    folder = tmp_path / "model"
    save(folder, 0.0)
    began = time.perf_counter()
    save(folder, 0.0)
    duration = time.perf_counter() - began
    last = 0.0
    for number in range(1, 61):
        writer = context.Process(target=save, args=(folder, float(number)))
        writer.start()
        time.sleep(draw.uniform(0.0, 2 * duration))
        writer.kill()
        writer.join()
        found = read(folder)
        assert found in (last, float(number))
        last = found
    save(folder, 99.0)
    assert read(folder) == 99.0
    assert len([name for name in names(folder) if not name.startswith(".")]) == 2
