"""How the packages may depend on each other, and that the compiler knows no model: properties of the source itself."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import networkx as nx
import pytest
from project_paths import ROOT

LIBRARIES = frozenset(("timm", "transformers", "open_clip", "diffusers", "peft"))
# The face of the package names what the zoo holds: commands, the demo.
FACE = ("madtp/cli/", "madtp/demo/")
# What looks upwards, at the compiler and the zoo.
ENTRIES = (
    *FACE,
    "madtp/api.py",
    "madtp/saving/checkpoint.py",
    "madtp/saving/rewriting_again.py",
    "madtp/survey/worker.py",
)
# "transformers" and "clip" are words, too: the library is told by its imports, the model by its capitals.
NAMES = re.compile(
    r"\b(timm|open_?clip|hugging ?face|CLIP|OpenCLIP|SigLIP\w*|BLIP\w*|(?i:\w*bert|blip\w*|siglip\w*|vilt|flava|lxmert|llava\w*"
    r"|llama\w*|bridgetower|qwen\w*|paligemma|gemma\w*|idefics\w*|smolvlm|florence\w*|swin\w*|dei?t|beit\w*|dino\w*|mllama"
    r"|gpt\w*|t5|owl-?vi?t\w*|q-?former|vit))\b"
)

# A test of transformers models, which skips itself without that library.
SKIPS = re.compile(r"importorskip\(.transformers")

# Folders and files of each package in the order in which they build on each other: none imports a later one.
ORDER = {
    "madtp": "errors files atomic_files processes config benchmark calls method tokens cost sites report programs pruned "
    "tuning saving pictures training evaluation survey api demo cli __main__",
    "rewriters": "graph axes capture canonicalise detect plan insert lower verify pipeline regions",
    "zoo": "suggestions named shipped adapters checkpoints metrics scenes datasets registry inputs builders examples small "
    "blip clip llava transforms tasks objectives recipes benchmark",
}
# Saving and pickling a pruned model, and rewriting again what was saved: the calls from a lower folder to a higher one.
UPWARDS = frozenset(
    (
        ("madtp/saving/rewriting_again.py", "madtp.api"),
        ("madtp/pruned/model.py", "madtp.saving.pickling"),
        ("madtp/pruned/host_class.py", "madtp.saving.host_folder"),
    )
)


def sources(*folders: str) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    return {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path
        for name, path in sources("madtp", "rewriters", "zoo")
    }


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules of the three packages that a file imports at run time; `lazy`: those that functions import, too."""
    known = modules()
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in known else node.module
        waiting.extend(ast.iter_child_nodes(node))


def place(module: str) -> str:
    """The folder or file below the package in which a module lies: "madtp.calls" for "madtp.calls.call"."""
    return ".".join(module.split(".")[:2])


def against_the_order(package: str, found: dict[str, list[str]]) -> list[str]:
    """Imports, listed by module, that go from an earlier place of `package` to a later one."""
    order = [f"{package}.{name}" for name in ORDER[package].split()]
    return [
        f"{module} imports {other}"
        for module, others in found.items()
        for other in others
        if other.startswith(f"{package}.") and order.index(place(other)) > order.index(place(module))
    ]


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


def paths_tested(environment: str, *, in_part: bool = False) -> list[str]:
    """The files and folders of tests that an environment of tox runs whole, or files of which it runs single tests."""
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    tested = tox[f"testenv:{environment}"]["set_env"].partition("MADTP_TEST_PATHS =")[2].replace("\\", " ").split()
    tested = [path.partition("::")[0] for path in tested if ("::" in path) == in_part]
    assert all((ROOT / path).exists() for path in tested)
    return tested


def test_the_environment_without_extras_tests_all_that_could_import_one() -> None:
    """Only the zoo imports them, so its own tests run there, and those of all folders that import it."""
    tested = paths_tested("noextras")
    for name, path in sources("madtp", "rewriters"):
        if "zoo" in {module.partition(".")[0] for module in imported(path)} and name.count("/") > 1:
            folder = "/".join(name.split("/")[:2])
            assert f"tests/{folder}" in tested, f"{name} imports the zoo"
    assert {"tests/zoo", "tests/test_architecture.py"} <= set(tested)


def test_every_test_runs_with_the_oldest_torch() -> None:
    """With extras or without them; with extras too, where a test needs transformers."""
    with_extras, without = (set(paths_tested(environment)) for environment in ("oldest", "noextras"))
    single = set(paths_tested("oldest", in_part=True))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        places = {place.relative_to(ROOT).as_posix() for place in (path, *path.parents) if place.is_relative_to(ROOT)}
        assert places & (with_extras | without), path
        if "case_models" in imported(path) or SKIPS.search(path.read_text(encoding="utf-8")):
            assert places & (with_extras | single), f"{path} skips tests where transformers is missing"


def test_files_stay_short() -> None:
    long = {n: c for n, p in sources("madtp", "rewriters", "zoo") if (c := len(p.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("package", ORDER)
def test_every_folder_has_its_place_in_the_order(package: str) -> None:
    present = {place(module) for module in modules() if module.startswith(f"{package}.")}
    assert present == {f"{package}.{name}" for name in ORDER[package].split()}


@pytest.mark.parametrize("package", ORDER)
def test_no_file_imports_from_a_later_folder(package: str) -> None:
    found = {
        module: [
            other for other in imports(path, lazy=True) if (path.relative_to(ROOT).as_posix(), other) not in UPWARDS
        ]
        for module, path in modules().items()
        if module.startswith(f"{package}.")
    }
    assert not against_the_order(package, found)


def test_an_import_against_the_order_is_found() -> None:
    assert against_the_order("rewriters", {"rewriters.axes.table": ["rewriters.insert.repairs"]})
    assert not against_the_order("rewriters", {"rewriters.insert.repairs": ["rewriters.axes.table", "madtp.errors"]})


def test_imports_of_files_and_folders_have_no_cycle() -> None:
    files: nx.DiGraph[str] = nx.DiGraph()
    folders: nx.DiGraph[str] = nx.DiGraph()
    for module, path in modules().items():
        for other in imports(path, lazy=False):
            files.add_edge(module, other)
            if place(module) != place(other):
                folders.add_edge(place(module), place(other))
    assert [c for graph in (files, folders) for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


@pytest.mark.parametrize(("package", "most"), [("rewriters", 13), ("madtp", 26)])
def test_the_top_of_a_package_is_read_at_a_glance(package: str, most: int) -> None:
    entries = [path.name for path in (ROOT / package).iterdir() if path.name != "__pycache__"]
    assert len(entries) <= most, sorted(entries)


def test_every_folder_says_what_it_is_for() -> None:
    inits = [(name, path) for name, path in sources("madtp", "rewriters", "zoo") if path.name == "__init__.py"]
    assert not [name for name, path in inits if not ast.get_docstring(tree(path))]


def test_every_module_imports() -> None:
    """Also what only some commands import. Modules that hold a program of their own run it when imported, and are left out."""
    for module in sorted(modules()):
        if not module.endswith("__main__"):
            importlib.import_module(module)
