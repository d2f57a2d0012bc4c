"""Files and folders are written whole or not at all, whatever interrupts the writer and whoever writes beside it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from madtp.atomic_files import (
    check_writable,
    check_writable_folder,
    draft_of,
    publish,
    remove_drafts,
    remove_folder,
    replacing_file,
    replacing_folder,
    write_text,
)
from madtp.errors import UnwritableError


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


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_that_a_library_made_private_has_the_permissions_of_any_other(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing_file(tmp_path / "a.txt") as draft:
            draft.touch(0o600)
        with replacing_folder(tmp_path / "folder") as draft:
            (draft / "b.txt").touch(0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "a.txt", tmp_path / "folder" / "b.txt"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        assert os.listdir(path.parent) in (["b.txt"], ["a.txt", "folder"], ["folder", "a.txt"])


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
        write(target, text)
        done.append(text)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(texts)
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


class Disk:
    """What of a folder a power cut would leave: files by their flushed content, names by the flushes of their folder.

    Inodes stand for files; a name that was not flushed with its folder is the one before, or none.
    """

    def __init__(self) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}

    def flush(self, path: Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self.names[inode] = {one.name: one.stat().st_ino for one in path.iterdir()}
        else:
            self.contents[inode] = path.read_bytes()

    def read(self, root: Path, *below: str) -> bytes | None:
        inode = root.stat().st_ino
        for name in below:
            inode = self.names.get(inode, {}).get(name, -1)
        return self.contents.get(inode)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, flush = Disk(), os.fsync

    def recorded(number: int) -> None:
        flush(number)
        inode = os.fstat(number).st_ino
        disk.flush(next(path for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == inode))

    monkeypatch.setattr("os.fsync", recorded)
    return disk


def test_a_file_outlasts_a_power_cut_with_its_folders(tmp_path: Path, disk: Disk) -> None:
    write_text(tmp_path / "a" / "b" / "file", "old")
    assert disk.read(tmp_path, "a", "b", "file") == b"old"
    write_text(tmp_path / "a" / "b" / "file", "new")
    assert disk.read(tmp_path, "a", "b", "file") == b"new"


def test_a_folder_outlasts_a_power_cut_with_all_in_it(tmp_path: Path, disk: Disk) -> None:
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "runs" / "step") as draft:
            (draft / "content").write_text(text)
            (draft / "inner").mkdir()
            (draft / "inner" / "content").write_text(text)
        assert disk.read(tmp_path, "runs", "step", "content") == text.encode()
        assert disk.read(tmp_path, "runs", "step", "inner", "content") == text.encode()


def test_a_file_is_flushed_before_it_has_its_name(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def checked(draft: Path, target: Path) -> None:
        assert disk.contents[draft.stat().st_ino] == b"x"
        replace(draft, target)

    monkeypatch.setattr("os.replace", checked)
    write_text(tmp_path / "file", "x")


def test_file_systems_that_flush_no_folders_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def files_only(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr("os.fsync", files_only)
    write_text(tmp_path / "below" / "file", "x")
    assert (tmp_path / "below" / "file").read_text() == "x"


FAILURES = {
    errno.ENOSPC: "No space left on device.*; free space there",
    errno.EDQUOT: "free space there",
    errno.EROFS: "Read-only file system.*; choose a place that you may write to",
    errno.EACCES: "Permission denied.*; choose a place that you may write to",
    errno.EIO: "check the disk",
}


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "pathlib.Path.mkdir"])
def test_what_the_system_refuses_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(first: object, *more: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number), str(first) if isinstance(first, Path) else None)

    target = tmp_path / "a" / "file.json"
    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(UnwritableError, match=FAILURES[number]) as caught:
            write_text(target, "new")
    assert str(caught.value).startswith(f"{target} cannot be written (")
    assert not list(tmp_path.iterdir())


def test_errors_of_files_that_are_read_meanwhile_are_their_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data"), replacing_file(tmp_path / "card.json"):
        (tmp_path / "data.json").read_text()
    with pytest.raises(SafetensorError), replacing_file(tmp_path / "card.json"):
        raise SafetensorError("Error while deserializing header: header too large")
    assert not list(tmp_path.iterdir())


def write_below(path: Path) -> None:
    write_text(path / "below" / "file", "new")


def a_file(path: Path) -> None:
    path.write_text("mine")


OTHERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "a folder for a file": (Path.mkdir, lambda path: write_text(path, "new"), "Is a directory"),
    "a pipe for a file": (os.mkfifo, lambda path: write_text(path, "new"), "choose another name"),
    "a file for a folder": (a_file, lambda path: whole_folder(path, "new"), "taken is a file"),
    "a file for a parent": (a_file, write_below, "taken is a file"),
    "a file for the parent of a folder": (a_file, lambda path: whole_folder(path / "x", "new"), "taken is a file"),
    "a file, asked before": (a_file, check_writable_folder, "taken is a file"),
    "a parent, asked before": (a_file, lambda path: check_writable(path / "below" / "x"), "taken is a file"),
    "a folder, asked before": (Path.mkdir, check_writable, "Is a directory"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_has_the_name_already_stays(tmp_path: Path, case: str) -> None:
    make, write, message = OTHERS[case]
    make(tmp_path / "taken")
    with pytest.raises(UnwritableError, match=f"cannot be written.*{message}"):
        write(tmp_path / "taken")
    assert names(tmp_path) == ["taken"]
    if make is a_file:
        assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("write", [check_writable, check_writable_folder, whole_folder, write_text])
def test_folders_without_the_right_to_write_are_named(tmp_path: Path, write: Callable[..., None]) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UnwritableError, match=r"Permission denied\); choose a place that you may write to"):
            write(tmp_path / "a" / "b", *(["x"] if write in (whole_folder, write_text) else []))
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_asking_whether_a_place_is_writable_changes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_long_names_leave_room_for_the_draft(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 250), "new")
    assert names(tmp_path) == ["x" * 250]
    with pytest.raises(UnwritableError, match="choose a shorter name"):
        write_text(tmp_path / ("x" * 300), "new")


def test_a_folder_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_folder(tmp_path / "step", "old")
    remove = shutil.rmtree

    def checked(path: Path) -> None:
        assert not (tmp_path / "step").exists()
        assert path.name.startswith(".")
        remove(path)

    monkeypatch.setattr("shutil.rmtree", checked)
    remove_folder(tmp_path / "step")
    assert not list(tmp_path.iterdir())


def test_drafts_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with draft_of(tmp_path / "model.safetensors") as one, draft_of(tmp_path / "step") as other:
        one.touch()
        other.mkdir()
        (other / "a").touch()
        (tmp_path / ".tmpgsOzsn").touch()  # as safetensors names what it writes
        left = [
            tmp_path / name for name in (".lock", ".model.safetensors", "model.0123456789ab.safetensors", "card.json")
        ]
        for path in left:
            path.touch()
        remove_drafts(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(left)
    remove_drafts(tmp_path / "nowhere")
