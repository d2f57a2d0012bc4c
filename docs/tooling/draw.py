"""Draw the pictures of the documentation into ``docs/pictures``.

    python docs/tooling/draw.py               # all of them
    python docs/tooling/draw.py speed packed  # some

``pipeline``, ``guidance``, ``packed`` and ``decision`` need no measurement. ``speed`` reads the tables of
``docs/performance.md``. ``graph_before`` and ``graph_after`` rewrite a small CLIP (transformers), ``survivors`` runs
models that ship, and ``demo`` draws two of the scenes that ``madtp demo`` draws, in a smaller file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import diagrams
import measured
from demo import write_demo
from svg import Drawing

PICTURES: dict[str, Callable[[], Drawing]] = {
    "pipeline": diagrams.pipeline,
    "guidance": diagrams.guidance,
    "packed": diagrams.packed,
    "decision": measured.decision,
    "speed": measured.speed,
    "graph_before": measured.graph_before,
    "graph_after": measured.graph_after,
    "survivors": measured.survivors,
}
DEMO = "demo"
FOLDER = Path(__file__).parent.parent / "pictures"


def main() -> None:
    """Command line."""
    known = (*PICTURES, DEMO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"pictures to draw: {', '.join(known)}; all by default")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: docs/pictures)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; choose from {', '.join(known)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names or known:
        if name == DEMO:
            print(write_demo(options.output / f"{DEMO}.png"))
        else:
            print(PICTURES[name]().write(options.output / f"{name}.svg"))


if __name__ == "__main__":
    main()
