"""How the packages may depend on each other, and that the compiler knows no model: properties of the source itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from project_paths import ROOT

LIBRARIES = frozenset(("timm", "transformers", "open_clip", "diffusers", "peft"))
# The face of the package names what the zoo holds: commands, the demo.
FACE = ("madtp/cli/", "madtp/demo/")
# What looks upwards, at the compiler and the zoo.
ENTRIES = (*FACE, "madtp/api.py", "madtp/saving/checkpoint.py", "madtp/survey/worker.py")
# "transformers" and "clip" are words, too: the library is told by its imports, the model by its capitals.
NAMES = re.compile(
    r"\b(timm|open_?clip|hugging ?face|CLIP|OpenCLIP|SigLIP\w*|BLIP\w*|(?i:\w*bert|blip\w*|siglip\w*|vilt|flava|lxmert|llava\w*"
    r"|llama\w*|bridgetower|qwen\w*|paligemma|gemma\w*|idefics\w*|smolvlm|florence\w*|swin\w*|dei?t|beit\w*|dino\w*|mllama"
    r"|gpt\w*|t5|owl-?vi?t\w*|q-?former|vit))\b"
)


def sources(*folders: str) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", ["madtp", "rewriters"])
def test_the_method_and_the_compiler_import_no_model_library(package: str) -> None:
    for name, path in sources(package):
        found = {module.partition(".")[0] for module in imported(path)} & LIBRARIES
        assert not found, f"{name} imports {sorted(found)}"


def test_the_method_and_the_compiler_name_no_model_and_no_library() -> None:
    found = []
    for name, path in sources("madtp", "rewriters"):
        if not name.startswith(FACE):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [
                f"{name}:{number}: {m.group()}" for number, line in enumerate(lines, 1) for m in NAMES.finditer(line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["as CLIP does", "# DistilBERT", "the ViT of timm", "llava_next"])
def test_names_of_models_are_recognised(line: str) -> None:
    assert NAMES.search(line)


@pytest.mark.parametrize("line", ["vision-language transformers", "aten.clip.default", "clip_norm: float", "invited"])
def test_words_that_only_look_like_names_pass(line: str) -> None:
    assert not NAMES.search(line)


def test_dependencies_run_one_way() -> None:
    for name, path in sources("madtp", "rewriters"):
        if name.startswith(ENTRIES):
            continue
        forbidden = {"zoo"} if name.startswith("rewriters/") else {"zoo", "rewriters"}
        found = {module.partition(".")[0] for module in imported(path)} & forbidden
        assert not found, f"{name} imports {sorted(found)}"


def test_files_stay_short() -> None:
    long = {n: c for n, p in sources("madtp", "rewriters", "zoo") if (c := len(p.read_text().splitlines())) > 400}
    assert not long
