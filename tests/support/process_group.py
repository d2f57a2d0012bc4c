"""Run a function in several processes of one torch.distributed group: :func:`run_workers`.

The processes meet in a file, so no port is needed. None outlives the call: a process that has not ended in time, or that has
lost one of the others, is killed with everything that it started.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

POLL_SECONDS = 0.05


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process that imports what this one imports, on one thread."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def run_workers(
    function: Callable[..., Any], folder: Path, size: int = 2, timeout: float = 120.0, **options: Any
) -> list[Any]:
    """Call a function in ``size`` processes, and return the results by rank.

    Args:
        function: top-level function of a module; called with ``folder`` and ``options``. Its result has to consist of
            tensors and plain values.
        folder: where the processes meet and write.
        size: number of processes.
        timeout: seconds after which all are killed.
        options: keyword arguments of the function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"file": function.__code__.co_filename, "name": function.__name__, "options": options}, folder / "call.pt"
    )
    children = []
    for rank in range(size):
        command = [sys.executable, "-m", "process_group", str(folder), str(rank), str(size)]
        log = (folder / f"log-{rank}.txt").open("w")
        children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True))
    watch(children, timeout, lambda: "\n".join((folder / f"log-{rank}.txt").read_text() for rank in range(size)))
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(size)]


def watch(children: list[subprocess.Popen[bytes]], timeout: float, logs: Callable[[], str]) -> None:
    """Wait until all have succeeded; kill all and fail as soon as one fails or time is up."""
    end = time.monotonic() + timeout
    try:
        while any(child.poll() is None for child in children):
            failed = any(child.poll() not in (None, 0) for child in children)
            assert not failed, logs()
            assert time.monotonic() < end, f"not done after {timeout} s\n{logs()}"
            time.sleep(POLL_SECONDS)
    finally:
        for child in children:
            kill(child)
    assert not any(child.returncode for child in children), logs()


def kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child that leads a session, and everything that it has started, in sessions of their own, too."""
    if child.poll() is None:
        started = _descendants(child.pid)
        os.killpg(child.pid, signal.SIGKILL)
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs; none where the system has no ``/proc``."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children[one]
    return found[1:]


def _main(folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    call = torch.load(folder / "call.pt")
    spec = importlib.util.spec_from_file_location("functions_of_workers", call["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=100)
    )
    result = getattr(module, call["name"])(folder, **call["options"])
    torch.save(result, folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
