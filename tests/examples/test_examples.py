"""Every example runs as a reader runs it, in a process of its own and from another folder, and prints what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from project_paths import ROOT

FOLDER = ROOT / "examples"


@dataclass(frozen=True)
class Case:
    """An example, the packages that it needs besides madtp's own, and patterns of lines that it prints."""

    name: str
    needs: tuple[str, ...]
    prints: tuple[str, ...]


CASES = (
    Case("clip_retrieval.py", ("transformers",), (r"^ +dense ", r"^ +[1-9]\d\.\d%", r"^saved as .*madtp\.json")),
    Case("llava_generation.py", ("transformers",), (r"^key/value cache: ", r"^dense: \d+ of 24", r"^pruned: \d+ are")),
    Case("vit_trainer.py", ("transformers", "accelerate"), (r"^dense: ", r"fine-tuned: ", r"^saved and loaded: ")),
    Case("lora.py", ("transformers", "peft"), (r"^dense: ", r"^pruned, with LoRA: ", r"^merged: ")),
    Case("onnx_runtime.py", ("onnx", "onnxscript", "onnxruntime"), (r"^wrote clip\.onnx", r"pruned, ONNX Runtime")),
    Case("new_scorer.py", ("transformers",), (r"^unusual +\d", r"^random +\d")),
    Case("your_architecture.ipynb", (), (r"saved and loaded, the same answers: True",)),
    Case("your_pictures.ipynb", (), (r"^pruned: \d+ of 24 pictures",)),
)


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run(command: Sequence[str], folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_runs_and_prints_what_it_promises(case: Case, tmp_path: Path) -> None:
    for module in case.needs:
        pytest.importorskip(module)
    script = FOLDER / case.name
    if script.suffix == ".ipynb":
        script = tmp_path / "notebook.py"
        script.write_text("\n".join(cells(FOLDER / case.name)), encoding="utf-8")
    printed = run([str(script)], tmp_path)
    missing = [pattern for pattern in case.prints if not re.search(pattern, printed, re.MULTILINE)]
    assert not missing, f"{missing} in\n{printed}"


def test_every_example_is_tested_and_listed() -> None:
    present = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")} - {"stand_ins.py"}
    assert {case.name for case in CASES} == present
    listed = re.findall(r"^\| \[`([\w.]+)`\]\(\1\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == present
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_output_and_no_names_of_machines(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(cell["metadata"] == {} for cell in content["cells"])
    assert set(content["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_scripts_say_what_they_show_need_and_print(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    wanted = () if path.name == "stand_ins.py" else (r"^Shows ", r"^Needs ", r"^Prints ", r"^def main\(")
    assert all(re.search(pattern, text, re.MULTILINE) for pattern in wanted)
