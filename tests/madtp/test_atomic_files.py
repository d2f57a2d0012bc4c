"""Files and folders are written whole or not at all, whatever interrupts the writer and whoever writes beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from madtp.atomic_files import draft_of, publish, replacing_file, replacing_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_a_file(path: Path, error: type[BaseException]) -> None:
    with replacing_file(path) as draft:
        draft.write_text("half")
        raise error("interrupted")


def whole_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as draft:
        (draft / "content").write_text(text)


def half_a_folder(path: Path, error: type[BaseException]) -> None:
    with replacing_folder(path) as draft:
        (draft / "content").write_text("half")
        raise error("interrupted")


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    write_text(target, "ä\n")
    assert target.read_bytes() == "ä\n".encode()
    assert names(target.parent) == ["b.json"]


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with replacing_file(target) as draft:
        draft.write_text("half")
        assert not target.exists()
        assert draft.suffix == ".txt"
        assert draft.name.startswith("."), "hidden from globs for files of that kind"
        draft.write_text("whole")
    assert target.read_text() == "whole"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error):
        half_a_file(target, error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "file"
    target.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    code = (
        "import os, pathlib, sys\n"
        "from madtp.atomic_files import replacing_file\n"
        "with replacing_file(pathlib.Path(sys.argv[1])) as draft:\n"
        "    draft.write_text('half')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing_file(target) as first, replacing_file(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first", "the one that finishes last"
    assert names(tmp_path) == ["file"]


def test_a_writer_that_fails_leaves_the_draft_of_another_alone(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with replacing_file(target) as good:
        good.write_text("good")
        with pytest.raises(ValueError, match="interrupted"):
            half_a_file(target, ValueError)
    assert target.read_text() == "good"


@pytest.mark.parametrize("write", [write_text, whole_folder], ids=["file", "folder"])
def test_threads_that_write_at_once_leave_one_whole_result(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    target = tmp_path / "target"
    texts = [str(number) * 50_000 for number in range(6)]
    done: list[str] = []

    def work(text: str) -> None:
        try:
            write(target, text)
            done.append(text)
        except OSError:  # another writer's folder came between
            pass

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = target.read_text() if target.is_file() else (target / "content").read_text()
    assert content in done
    assert names(tmp_path) == ["target"]


def test_a_draft_may_be_published_under_a_name_that_depends_on_it(tmp_path: Path) -> None:
    with draft_of(tmp_path / "model.bin") as draft:
        draft.write_bytes(b"123")
        publish(draft, tmp_path / f"model-{draft.stat().st_size}.bin")
    assert names(tmp_path) == ["model-3.bin"]


def test_a_folder_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "step"
    with replacing_folder(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    with replacing_folder(target) as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "b").write_text("2")
        assert names(target) == ["a"]
    assert names(target) == ["inner"]
    assert (target / "inner" / "b").read_text() == "2"
    assert names(tmp_path) == ["step"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_writing_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "step"
    whole_folder(target, "old")
    with pytest.raises(error):
        half_a_folder(target, error)
    assert (target / "content").read_text() == "old"
    assert names(tmp_path) == ["step"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step"
    whole_folder(target, "old")
    rename = Path.rename

    def fail_for_drafts(source: Path, name: Path) -> Path:
        if source.name.startswith(".") and (source / "content").read_text() == "new":
            raise OSError(28, "No space left on device")
        return rename(source, name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_drafts)
        with pytest.raises(OSError, match="No space left"):
            whole_folder(target, "new")
    assert (target / "content").read_text() == "old"
    assert names(tmp_path) == ["step"]


def test_what_is_renamed_has_reached_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda number: (order.append("flush"), flush(number))[1])
    monkeypatch.setattr("os.replace", lambda *paths: (order.append("rename"), replace(*paths))[1])
    write_text(tmp_path / "file", "x")
    assert order == ["flush", "rename"]
