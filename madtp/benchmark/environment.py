"""On what machine and with which libraries something was measured: :func:`describe_environment`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Environment:
    """A machine, as far as times depend on it.

    Attributes:
        cpu: name of the processor.
        capability: vector instructions that torch uses.
        cores: number of logical processors.
        threads: threads of torch.
        load: mean number of running processes in the minute before; None where the system does not say.
        system: operating system.
        python: version of Python.
        versions: versions of the libraries that are installed.
    """

    cpu: str
    capability: str
    cores: int
    threads: int
    load: float | None
    system: str
    python: str
    versions: dict[str, str]


def describe_environment(libraries: Sequence[str] = ("madtp", "torch")) -> Environment:
    """Return the environment of this process.

    Args:
        libraries: distributions whose versions matter.
    """
    load = None
    with suppress(OSError, AttributeError):
        load = round(os.getloadavg()[0], 2)
    versions = {}
    for name in libraries:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return Environment(
        cpu=_cpu_name(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load=load,
        system=platform.platform(),
        python=platform.python_version(),
        versions=versions,
    )


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
