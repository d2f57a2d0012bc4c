"""The tooling of the site: links to files outside it, and that the built pages fetch nothing from other hosts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import DOCS

TOOLING = DOCS / "tooling"


def tool(name: str) -> ModuleType:
    """A module of the tooling, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLING / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("place", "page", "link", "turned"),
    [
        ("docs/guides/data.md", "guides/data.md", "../models.md#data-sets", "../models.md#data-sets"),
        (
            "docs/concepts/rewriter.md",
            "concepts/rewriter.md",
            "../../CONTRIBUTING.md#tests",
            "../contributing.md#tests",
        ),
        ("docs/licences.md", "licences.md", "../LICENSE", "https://github.com/madtp/madtp/blob/main/LICENSE"),
        ("CONTRIBUTING.md", "contributing.md", "docs/method.md", "method.md"),
        ("docs/index.md", "index.md", "https://arxiv.org/abs/2403.02991", "https://arxiv.org/abs/2403.02991"),
        ("docs/index.md", "index.md", "missing.md", "missing.md"),
    ],
)
def test_links_lead_to_the_site_or_to_the_source(place: str, page: str, link: str, turned: str) -> None:
    assert tool("root_pages").turn_links(f"[words]({link})", place, page) == f"[words]({turned})"


@pytest.mark.parametrize(
    ("name", "text", "address"),
    [
        ("a.html", '<script src="https://unpkg.com/x.js"></script>', "https://unpkg.com/x.js"),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/css">', "//fonts.example/css"),
        ("a.css", "@font-face { src: url(https://fonts.example/a.woff2) }", "https://fonts.example/a.woff2"),
        ("a.html", '<a href="https://arxiv.org/abs/2403.02991">paper</a><script src="assets/x.js"></script>', None),
        ("a.html", '<link rel="canonical" href="https://madtp.example/">', None),
    ],
)
def test_what_a_page_fetches_from_other_hosts_is_found(
    name: str, text: str, address: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert list(tool("check_offline").fetched(tmp_path)) == ([] if address is None else [f"{name}: {address}"])


@pytest.mark.parametrize("picture", ["pipeline", "guidance", "packed", "decision", "speed"])
def test_pictures_are_those_that_their_commands_draw(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TOOLING)
    drawn = tool("draw").PICTURES[picture]().write(tmp_path / f"{picture}.svg")
    assert drawn.read_bytes() == (DOCS / "pictures" / drawn.name).read_bytes(), f"python docs/tooling/draw.py {picture}"
