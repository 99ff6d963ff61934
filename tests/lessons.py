"""For the tests of lessons/: their names begin with a digit, so they are loaded by path."""

import importlib.util
from types import ModuleType

from tests.conftest import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lesson_{name[0]}", ROOT / "lessons" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
