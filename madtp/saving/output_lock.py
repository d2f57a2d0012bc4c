"""One run to an output: :func:`claimed` holds a lock file while a run writes, and says who else does.

The operating system holds the lock, and lets go of it when the process ends, however it ends. So a file that a killed process
left behind locks nothing, and the next run takes it over. It names its owner for people only.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from madtp.errors import DataError, MadtpError, OutputInUseError
from madtp.processes import ALONE, Processes

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TRIES = 100


@contextmanager
def claimed(output: Path, lock: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Hold a lock file for the block; remove it afterwards, and the folders that were made for it if they are still empty.

    Args:
        output: what is written; messages name it.
        lock: the lock file. Its folder is created.
        processes: the processes that call this together. The main one holds the lock, all of them raise.

    Raises:
        OutputInUseError: another run holds the lock; the message names its process.
        DataError: the file cannot be written.
    """
    made = [folder for folder in lock.absolute().parents if not folder.exists()] if processes.main else []
    taken = _taken(output, lock) if processes.main else None
    try:
        refusal = processes.from_main(taken if isinstance(taken, MadtpError) else None)
        if refusal is not None:
            raise refusal
        yield
    finally:
        if isinstance(taken, int):
            with suppress(OSError):  # Windows removes no open file; it stays, unlocked
                lock.unlink()
            os.close(taken)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _taken(output: Path, lock: Path) -> int | MadtpError:
    """Take the lock; return an open descriptor that holds it, or why it could not be taken."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            if not _locked(descriptor):
                os.lseek(descriptor, 0, os.SEEK_SET)
                owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                return OutputInUseError(
                    f"{output} is in use by {owner}, which holds {lock}; wait until it is done, or choose another output."
                )
            # The owner before may have removed the file between the two calls: the lock would be on a file without a name.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
            os.close(descriptor)
    except OSError as error:
        return DataError(f"{output} cannot be written ({error.strerror or error}); choose another output.")
    return OutputInUseError(f"{lock} is taken and left by other processes all the time; choose another output.")


def _locked(descriptor: int) -> bool:
    """Lock an open file unless another process has; True also where the file system has no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # others may read what lies in front
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
