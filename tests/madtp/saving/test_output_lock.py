"""One run to an output: who holds the lock is named, and the lock of a dead process is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from madtp.errors import DataError, OutputInUseError
from madtp.saving.output_lock import claimed


def test_the_second_is_told_who_the_first_is_and_comes_after_it(tmp_path: Path) -> None:
    output, lock = tmp_path / "e.json", tmp_path / "new" / "deep" / ".lock"
    with claimed(output, lock):
        assert f"process {os.getpid()} on " in lock.read_text()
        told = rf"e\.json is in use by process {os.getpid()} on .*choose another"
        with pytest.raises(OutputInUseError, match=told), claimed(output, lock):
            pytest.fail("two at once")
        assert lock.exists()
    assert not list(tmp_path.iterdir())
    with claimed(output, lock):
        (lock.parent / "result").write_text("1")
    assert [path.name for path in lock.parent.iterdir()] == ["result"]


def test_an_error_in_the_block_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), claimed(tmp_path, tmp_path / ".lock"):
            raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["", "process 1 on here", "process 99999999 on elsewhere", "\x00\xff"])
def test_what_a_dead_process_left_locks_nothing(tmp_path: Path, left: str) -> None:
    """Also where another process has its number by now."""
    (tmp_path / ".lock").write_text(left)
    with claimed(tmp_path, tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


@pytest.mark.parametrize("lock", ["file/.lock", "folder"])
def test_what_cannot_be_written_is_told(tmp_path: Path, lock: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be written"), claimed(tmp_path / "out", tmp_path / lock):
        pytest.fail("written")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_of_many_at_once_never_two_hold_it(tmp_path: Path) -> None:
    inside, most, held = [0], [0], [0]
    count = threading.Lock()

    def work() -> None:
        for _ in range(200):
            try:
                with claimed(tmp_path, tmp_path / "a" / ".lock"):
                    with count:
                        inside[0] += 1
                        held[0] += 1
                        most[0] = max(most[0], inside[0])
                    with count:
                        inside[0] -= 1
            except (OutputInUseError, DataError):
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert held[0] > 100


@pytest.mark.slow
def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from madtp.saving.output_lock import claimed\n"
        "with claimed(Path('out'), Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    lock = tmp_path / ".lock"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(OutputInUseError, match=rf"process {child.pid} on "), claimed(tmp_path, lock):
            pytest.fail("two at once")
    finally:
        child.kill()
        child.wait()
    assert lock.exists()
    with claimed(tmp_path, lock):
        pass
