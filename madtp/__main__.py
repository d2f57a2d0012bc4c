"""`python -m madtp`, the command line; what launchers such as `torchrun -m madtp train` start."""

from __future__ import annotations

from madtp.cli import main

if __name__ == "__main__":
    main()
