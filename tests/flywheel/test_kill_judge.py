"""kill -9 while a judge on a server is at work: what was answered is not asked again, and the labels are the same."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from polm.data.readers import write_jsonl
from polm.flywheel.store import external_key, is_finished
from polm.recipe_judge import JudgeStage

CONCURRENCY = 3


@pytest.mark.parametrize("answered", [1, 10, 23])
def test_a_killed_judge_goes_on(answered: int, chat_server: Any, start_child: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "long" + "g" * i, "rejected": "s"} for i in range(12)]
    write_jsonl(tmp_path / "in" / "preferences.jsonl", rows)

    gate = threading.Event()  # after so many answers the server thinks for ever

    def reply(body: dict[str, Any], number: int) -> str:
        if number >= answered:
            gate.wait(60)
        _, a, b = body["messages"][0]["content"].split("|")
        return f"[[{'A' if len(a) > len(b) else 'B'}]]"

    server = chat_server(reply)
    endpoint = {"url": server.url, "model": "m", "concurrency": CONCURRENCY}
    judging = {"verdict": "text", "pair_prompt": "{question}|{answer_a}|{answer_b}", "endpoint": endpoint}
    settings = JudgeStage.model_validate({"judging": judging}).model_dump(mode="json")
    inputs = {"data": str(tmp_path / "in")}
    out = tmp_path / "work" / "out"
    order = ("judge", settings, inputs, {role: external_key(source) for role, source in inputs.items()}, str(out))
    child = start_child(stage=order)
    deadline = time.monotonic() + 60
    while len(kept := list((tmp_path / "work" / ".replies").glob("*/[!.]*.json"))) < answered:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.join()
    gate.set()
    assert not is_finished(out)
    assert len(kept) == answered
    again = start_child(stage=order)
    again.join(60)
    assert again.exitcode == 0
    assert is_finished(out)
    asked = Counter(json.dumps(body["messages"]) for body in server.bodies)
    assert len(asked) == 24
    # Only what was under way at the kill is asked a second time.
    assert sum(asked.values()) <= 24 + CONCURRENCY
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["ledger"] == {"pairs": 12, "equal": 0, "preferred": 12}
    assert manifest["summary"]["agreement"] == 1.0
