"""The built site fetches nothing from other hosts: no fonts, scripts, styles, pictures or icons.

A hook of MkDocs, which runs after each build. Links that a reader may click are not fetched, and pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

OTHER_HOST = r"""["']?\s*((?:https?:)?//[^"'\s>)]+)"""
FETCHED = {
    ".html": re.compile(
        rf"<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|srcset|data)={OTHER_HOST}"
        rf"|<link\b(?![^>]*\brel=[\"']?(?:canonical|prev|next|alternate))[^>]*?\bhref={OTHER_HOST}",
        re.I,
    ),
    ".css": re.compile(rf"(?:url\(|@import\s){OTHER_HOST}", re.I),
    ".svg": re.compile(rf"(?:url\(|@import\s|\b(?:xlink:)?href=){OTHER_HOST}", re.I),
}


def on_post_build(config: MkDocsConfig) -> None:
    """Look through the site that was built.

    Raises:
        PluginError: a page, a style sheet or a picture fetches something from another host.
    """
    from mkdocs.exceptions import PluginError

    found = sorted(set(fetched(Path(config.site_dir))))
    if found:
        raise PluginError("the site fetches from other hosts:\n" + "\n".join(found))


def fetched(site: Path) -> Iterator[str]:
    """Find what the files of a site fetch from other hosts, as ``file: address``."""
    for path in site.rglob("*"):
        pattern = FETCHED.get(path.suffix)
        if pattern is not None:
            for match in pattern.finditer(path.read_text(encoding="utf-8")):
                yield f"{path.relative_to(site).as_posix()}: {next(filter(None, match.groups()))}"
