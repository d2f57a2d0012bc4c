"""``python -m madtp``: the command line, as launchers such as ``torchrun -m madtp train`` start it."""

from __future__ import annotations

from madtp.cli import main

if __name__ == "__main__":
    main()
