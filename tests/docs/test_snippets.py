"""The Python on the pages runs as printed, or is at least Python."""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, PAGES, name_of, snippets
from project_paths import ROOT

STORIES = [*sorted((DOCS / "start").glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]
"""Pages whose blocks run one after the other, as a reader would paste them."""
NOT_RUN = {
    "docs/guides/several_machines.md": "needs several processes; tests/madtp/test_composition.py runs it",
    "docs/guides/recipes.md": "goes on from a training",
}
QUICK = {"docs/start/install.md", "docs/guides/data.md"}
EXTRAS = ("transformers", "peft", "onnxruntime", "onnxscript")


def needs(code: str) -> set[str]:
    """Optional packages without which a page cannot run."""
    found = {extra for extra in EXTRAS if f"import {extra}" in code or f"from {extra}" in code}
    return found | {"transformers"} if '"hf:' in code else found


def story(page: Path) -> str:
    """All code of a page, with its line numbers; blocks that begin with "# not run" are left out."""
    lines: list[str] = []
    for snippet in snippets(page, "python"):
        if not snippet.code.startswith("# not run"):
            lines += [""] * (snippet.line - 1 - len(lines)) + snippet.code.splitlines()
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs_as_printed(tmp_path: Path) -> None:
    """In a process of its own, as nothing else has been imported there; and without a warning."""
    pytest.importorskip("transformers")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", story(ROOT / "README.md")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "torch.Size([4, 4])" in done.stdout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=() if name_of(page) in QUICK else pytest.mark.slow)
        for page in STORIES
        if name_of(page) not in NOT_RUN and story(page)
    ],
)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = story(page)
    missing = [name for name in needs(code) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("madtp"), "disabled", True)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_every_start_page_and_guide_runs_or_says_why_not() -> None:
    without = [name_of(page) for page in STORIES if not story(page)]
    assert not without, "pages of Start and Guides show code that can be run"
    assert NOT_RUN.keys() <= {name_of(page) for page in STORIES}


@pytest.mark.parametrize("page", PAGES, ids=[name_of(page) for page in PAGES])
def test_python_on_a_page_is_python(page: Path) -> None:
    for snippet in snippets(page, "python"):
        try:
            ast.parse(snippet.code)
        except SyntaxError as error:
            pytest.fail(f"{name_of(page)}:{snippet.line}: {error}")
