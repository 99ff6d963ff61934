"""The house plan, held by reading imports: commands above kqv/, kqv/ above nothing, model.py on torch alone."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMANDS = {path.stem for path in ROOT.glob("*.py")} - {"model"}
ROOMS = {path.stem for path in (ROOT / "kqv").glob("*.py")} - {"__init__"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor is meant"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "kqv"}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def rooms(path: Path) -> set[str]:
    """The rooms of kqv/ that a file imports."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "kqv" and len(name) > 1} & ROOMS


def test_model_py_needs_torch_and_the_standard_library_alone():
    assert tops(ROOT / "model.py") <= sys.stdlib_module_names | {"torch", "kqv"}
    assert rooms(ROOT / "model.py") == {"hub"}  # from_pretrained calls it


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_kqv_imports_no_command_and_not_the_model(room):
    assert not tops(ROOT / "kqv" / f"{room}.py") & (COMMANDS | {"model", "prepare", "tests"})


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_command_imports_another(command):
    allowed = {"train"} if command == "explain" else set()  # explain.py's experiments are training runs
    assert not (tops(ROOT / f"{command}.py") & COMMANDS) - allowed


@pytest.mark.parametrize("path", sorted((ROOT / "prepare").glob("*.py")), ids=lambda path: path.stem)
def test_prepare_scripts_stand_on_kqv_alone(path):
    scripts = {script.stem for script in (ROOT / "prepare").glob("*.py")}
    assert not tops(path) & (COMMANDS | scripts | {"model"})


def test_no_rooms_import_each_other_in_a_circle():
    arrows = {room: rooms(ROOT / "kqv" / f"{room}.py") - {room} for room in ROOMS}
    while ground := {room for room, below in arrows.items() if not below}:
        arrows = {room: below - ground for room, below in arrows.items() if room not in ground}
    assert not arrows, f"in or above a circle: {arrows}"
