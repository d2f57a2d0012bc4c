"""What pages name exists: files, links and their anchors, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from pages import FENCE, PAGES, name_of, snippets
from project_paths import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from madtp.cli.app import app

PATH = re.compile(r"(?:madtp|rewriters|zoo|tests|benchmarks|docs)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s:#]*)(?:#([^)\s]*))?\)")
ids = [name_of(page) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_a_page_names_exist(page: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {path for text in code for path in PATH.findall(text)}
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """Relative paths, which work on GitHub as well; the site's build checks them again."""
    broken = []
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(f"{target}#{anchor}")
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands_in(text: str) -> list[list[str]]:
    """The calls of ``madtp`` in a block of shell, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    calls = [line.partition("#")[0] for line in lines]
    found = re.findall(r"(?:^|&& |\$ |-m )madtp ([^&|;\n]*)", "\n".join(calls), re.M)
    return [shlex.split(call) for call in found]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_on_a_page_exist_with_their_options(page: Path) -> None:
    group = get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for snippet in snippets(page, "sh", "console"):
        for name, *words in filter(None, commands_in(snippet.code)):
            if name.startswith("-"):
                continue
            assert name in group.commands, f"{name_of(page)}:{snippet.line}: no command {name}"
            options = {option for parameter in group.commands[name].params for option in parameter.opts}
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= options | {"--help"}, f"{name_of(page)}:{snippet.line}: {name} has no {used - options}"


def test_a_wrong_option_is_found() -> None:
    calls = commands_in(
        "madtp demo && madtp eval --model x \\\n  --colour red  # words\ntorchrun -m madtp compress -r 0.5"
    )
    assert calls == [["demo"], ["eval", "--model", "x", "--colour", "red"], ["compress", "-r", "0.5"]]


def test_commands_that_pages_mention_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`madtp ([a-z]+)", page.read_text(encoding="utf-8"))}
    assert named
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_the_readme_fits_a_screen_and_has_the_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install tox && tox" in text, "CI runs it"
    assert len(text.splitlines()) <= 90


def test_every_picture_is_shown_and_says_what_it_shows() -> None:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in sorted((ROOT / "docs" / "pictures").iterdir()):
        assert re.search(rf"!\[[^\]]{{20,}}\]\([\w./]*{re.escape(picture.name)}\)", texts), picture.name
