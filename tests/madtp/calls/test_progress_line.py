"""A line on the terminal appears for what takes long, and is wiped."""

from __future__ import annotations

import io
import time

import pytest
from small_vit import images, rewritten

from madtp.calls import progress_line as module
from madtp.calls.progress_line import progress_line, stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    monkeypatch.setattr(module, "PAUSE", 0.01)


def test_a_terminal_shows_the_stage_and_is_wiped() -> None:
    terminal = Terminal()
    with progress_line("rewriting Net", terminal):
        stage("capturing blocks")
        time.sleep(0.2)
    assert "rewriting Net: capturing blocks (0 s)" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")


def test_what_is_quick_or_no_terminal_shows_nothing() -> None:
    terminal, file = Terminal(), io.StringIO()
    with progress_line("rewriting Net", terminal):
        pass
    with progress_line("rewriting Net", file):
        time.sleep(0.05)
    assert not terminal.getvalue()
    assert not file.getvalue()


def test_a_line_inside_another_leaves_it_alone() -> None:
    terminal = Terminal()
    with progress_line("loading", terminal), progress_line("rewriting", terminal):
        stage("checking")
        time.sleep(0.1)
    assert "loading: checking" in terminal.getvalue()
    assert "rewriting" not in terminal.getvalue()


def test_a_first_call_of_a_kind_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, terminal = rewritten(depth=2), Terminal()
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", terminal)
    pruned(images(2, 0))
    assert not terminal.getvalue(), "a program serves it"
    pruned.double()(images(2, 0).double())
    assert "preparing VisionTransformer for a new kind of call: capturing" in terminal.getvalue()
