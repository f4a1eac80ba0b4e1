"""The child process in which a user's reward function runs: `python -m polm.rewards.function_worker FILE NAME`.

It imports nothing heavy of its own: it is started again after each kill.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from polm.rewards.child import serve

NOTE_CHARACTERS = 200


def prepare() -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Imports FILE and takes NAME out of it, both from the command line."""
    file, name = sys.argv[1:3]
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location("reward_function", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise SystemExit(f"it has no function {name!r} (found: {', '.join(found) or 'none'})")
    return partial(answer, function)


def answer(function: Callable[..., Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """One call of the function: {"rewards": a number, None or a complaint each} or {"error": why there are none}."""
    try:
        columns = select_columns(function, request["columns"])
        given = function(prompts=request["prompts"], completions=request["completions"], **columns)
        values = list(asyncio.run(given) if inspect.iscoroutine(given) else given)
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is an answer that was not judged
        return {"error": f"{type(error).__name__}: {error}"[:NOTE_CHARACTERS]}
    expected = len(request["completions"])
    if len(values) != expected:
        return {"error": f"the reward function returned {len(values)} rewards for {expected} completions"}
    return {"rewards": [describe_value(value) for value in values]}


def select_columns(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(columns)
    wanted = {p.name for p in parameters}
    return {name: value for name, value in columns.items() if name in wanted}


def describe_value(value: Any) -> float | str | None:
    """A finite number as it is (also of numpy and torch, and a bool), None, or what is wrong with the value."""
    if value is None:
        return None
    if isinstance(value, str | bytes):
        return f"the reward function returned {value!r:.60}, expected a number"
    try:
        number = float(value)
    except Exception as error:  # noqa: BLE001 - the value is of the user's function, and anything may come of it
        return f"the reward function returned a {type(value).__name__}, expected a number ({type(error).__name__})"
    return number if math.isfinite(number) else f"the reward function returned {number}"


if __name__ == "__main__":
    serve(prepare)
