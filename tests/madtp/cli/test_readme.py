"""The documentation is true: the README's snippets run as printed, its commands exist, and so does every file that is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project_paths import ROOT
from typer.testing import CliRunner

from madtp.cli.app import app

README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs_as_printed(number: int, tmp_path: Path) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?:madtp|rewriters|zoo|tests|benchmarks|docs)/[\w./-]*\w")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {
        path for text in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")) for path in PATH.findall(text)
    }
    linked = set(re.findall(r"\]\(([\w./-]+\.(?:md|png))\)", page.read_text(encoding="utf-8")))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing + [link for link in linked if not (page.parent / link).exists()]


def test_commands_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`madtp ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
