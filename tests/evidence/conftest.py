"""What the tests of evidence share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import polm

EVIDENCE = Path(polm.__file__).parent.parent / "evidence"


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports run.py of a folder of evidence. Its modules import each other by their plain names; none stays behind."""
    pytest.importorskip("matplotlib")
    before = dict(sys.modules)

    def load(folder: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(EVIDENCE / folder))
        return importlib.import_module("run")

    yield load
    for name in {path.stem for path in EVIDENCE.glob("*/*.py")} - before.keys():
        sys.modules.pop(name, None)
