"""The pages of the documentation, and the code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from project_paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.S | re.M)


@dataclass(frozen=True)
class Snippet:
    """A block of code on a page.

    Attributes:
        language: behind the fence, such as "python" or "sh".
        code: the block.
        line: where it begins on the page.
    """

    language: str
    code: str
    line: int


def name_of(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def snippets(page: Path, *languages: str) -> Iterator[Snippet]:
    """The blocks of a page in the languages, in their order."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield Snippet(found[1], found[3], text.count("\n", 0, found.start()) + 2)
