"""Pages of the site that lie at the root of the repository, and links from pages to files that are no pages.

A hook of MkDocs. ``CONTRIBUTING.md`` and ``CHANGELOG.md`` stay where GitHub looks for them. Pages link to them, and to sources,
by relative paths that work on GitHub; here the links are turned to the page of the site, or to the file on GitHub.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
DOCS = "docs"
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages of the site, by their place in the repository. The front page takes the place of the README."""
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md")
SOURCES = "https://github.com/madtp/madtp/blob/main/"

LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.S | re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside the folder of the documentation."""
    from mkdocs.structure.files import File

    for name in COPIED:
        files.append(File.generated(config, ROOT_PAGES[name], abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page; code stays as it is."""
    home = {site: name for name, site in ROOT_PAGES.items() if name in COPIED}.get(page.file.src_uri)
    place = home or f"{DOCS}/{page.file.src_uri}"
    parts = FENCE.split(markdown)
    return "".join(part if FENCE.match(part) else turn_links(part, place, page.file.src_uri) for part in parts)


def turn_links(text: str, place: str, page: str) -> str:
    """Turn the links of a text to where they lead on the site.

    Args:
        text: markdown.
        place: the file that holds it, in the repository.
        page: its place on the site.
    """

    def turned(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[1]))
        if target in ROOT_PAGES:
            on_site = ROOT_PAGES[target]
        elif target.startswith(f"{DOCS}/"):
            on_site = target.removeprefix(f"{DOCS}/")
        elif (ROOT / target).exists():
            return f"{SOURCES}{target}{found[2] or ''}"
        else:
            return found[0]  # which the build then complains about
        return posixpath.relpath(on_site, posixpath.dirname(page) or ".") + (found[2] or "")

    return LINK.sub(turned, text)
