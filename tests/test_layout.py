"""The rooms of the package, and the arrows between them."""

import ast

import pytest
from helpers.data import REPOSITORY

PACKAGE = REPOSITORY / "embedding_finetune"
TOP = {"command_line", "files", "distributed", "parser", "process", "progress"}
MAY_IMPORT = {
    "top": set(),
    "data": {"top"},
    "model": {"top", "data"},
    "retrieval": {"top", "data", "model"},
    "mining": {"top", "data", "model", "retrieval"},
    "evaluation": {"top", "data", "model", "retrieval"},
    "training": {"top", "data", "model", "retrieval", "mining", "evaluation"},
}
SCRIPTS = {"mine_hard_neg", "finetune", "evaluate"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the package"
            yield node.module


def room_of(name):
    """The room of a module by its dotted name without the package; None for the package itself."""
    first, _, rest = name.partition(".")
    return first if rest or first in MAY_IMPORT else "top" if first else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = "top" if len(parts) == 1 else parts[0]
    for name in imports_of(path):
        assert name.split(".")[0] not in SCRIPTS, f"{path.name} imports the script {name}"
        if name.startswith("embedding_finetune"):
            room = room_of(name.removeprefix("embedding_finetune").removeprefix("."))
            assert room in {own, None} | MAY_IMPORT[own], f"{own} imports {name}"


def test_there_is_one_level_of_folders_and_only_what_has_no_room_lies_outside():
    assert {path.parent.name for path in MODULES} == (MAY_IMPORT.keys() - {"top"}) | {PACKAGE.name}
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP | {"__init__"}


def test_every_module_that_decides_something_has_its_tests():
    """In test_NAME.py, or test_ROOM_NAME.py where modules of two rooms have the same name."""
    code = (ast.FunctionDef, ast.ClassDef)
    deciding = [path for path in MODULES if any(isinstance(node, code) for node in ast.parse(path.read_text()).body)]
    names = [path.stem for path in deciding]

    def test_file(path):
        room = "" if path.parent == PACKAGE or names.count(path.stem) == 1 else f"{path.parent.name}_"
        return REPOSITORY / "tests" / f"test_{room}{path.stem}.py"

    assert [test_file(path).name for path in deciding if not test_file(path).exists()] == []
