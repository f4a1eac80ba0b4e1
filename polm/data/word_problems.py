"""Placeholder by the lead so that imports work until the real file is written over it."""
from typing import Any


def build_word_problems_dataset(*args: Any, **kwargs: Any) -> dict[str, Any]:
    raise RuntimeError("not written yet")
