"""`polm pairs`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polm.data.readers import Prompt, read_preferences, read_prompts
from polm.errors import DataError
from polm.rewards.verify import Verdict, verify_many
from polm.rollout.generate import Completion
from polm.stages import pairs
from polm.stages.pairs import build_pairs


def test_right_over_wrong(artifact: Any, read_manifest: Any) -> None:
    """In the tests an even number of characters is right."""
    folder = artifact("pairs")
    found = read_preferences(folder / "preferences.jsonl")
    prompts = [p.prompt for p in read_prompts(artifact("data") / "prompts.jsonl")]
    assert len(found) >= 3
    for pair in found:
        assert pair.prompt[0]["content"] in prompts
        assert len(pair.chosen) % 2 == 0
        assert len(pair.rejected) % 2 == 1
    assert len({pair.prompt[0]["content"] for pair in found}) == len(found)  # one pair a prompt
    manifest = read_manifest(folder)
    ledger = manifest["ledger"]
    assert manifest["summary"]["pairs"] == len(found)
    assert ledger["samples"] == 12 * 4 == ledger["right"] + ledger["wrong"]
    assert manifest["summary"]["sampled_accuracy"] == ledger["right"] / 48


def test_no_pair_is_an_error_that_says_why(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true verifier: a model of this size is never right."""
    artifact("sft")
    monkeypatch.setitem(artifact.run.__globals__, "judge_by_length", verify_many)
    with pytest.raises(DataError, match=r"no preference pair: among 48 samples of 12 prompts.*unparsed.*raise samples"):
        artifact.run("pairs", artifact.spec("pairs")[1], artifact.inputs("pairs"), tmp_path / "out")


def complete(prompt: int, sample: int, text: str) -> Completion:
    return Completion(prompt, sample, np.array([1]), np.array([-1.0], dtype=np.float32), "stop", text)


def judge(status: str) -> Verdict:
    return Verdict(status, "")  # type: ignore[arg-type]


def test_who_stands_where() -> None:
    """Time-outs, errors and empty answers are on neither side; equal texts count once."""
    prompts = [Prompt(f"p{i}", "1", "exact") for i in range(4)]
    samples = [
        (0, "a", "right"), (0, "a", "right"), (0, "b", "wrong"), (0, "c", "unparsed"),
        (1, "a", "right"), (1, "b", "timeout"), (1, "c", "error"), (1, " ", "wrong"),
        (2, "a", "wrong"), (2, "b", "wrong"),
        (3, "a", "right"), (3, "b", "right"), (3, "c", "wrong"), (3, "d", "wrong"), (3, "e", "wrong"),
    ]  # fmt: skip
    completions = [complete(p, i, text) for i, (p, text, _) in enumerate(samples)]
    verdicts = [judge(status) for _, _, status in samples]
    rows = build_pairs(prompts, completions, verdicts, 5, seed=0)
    assert Counter(row["prompt"] for row in rows) == {"p0": 1, "p3": 2}
    assert rows[0]["chosen"] == "a"
    assert rows[0]["rejected"] in "bc"
    assert {row["chosen"] for row in rows[1:]} == {"a", "b"}
    assert len({row["rejected"] for row in rows[1:]}) == 2
    assert [row["prompt"] for row in build_pairs(prompts, completions, verdicts, 1, seed=0)] == ["p0", "p3"]
    assert build_pairs(prompts, completions, verdicts, 5, seed=0) == rows
    orders = {str(build_pairs(prompts, completions, verdicts, 5, seed=s)) for s in range(8)}
    assert len(orders) > 1


def test_every_sample_is_judged_by_its_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(pairs, "verify_many", lambda items, seconds: seen.extend([*items, seconds]))
    pairs.judge([(Prompt("p", "7", "expression", numbers=(1.0, 2.0)), "text")], 1.5)
    item, seconds = seen
    assert (item.verifier, item.completion, item.answer, item.numbers) == ("expression", "text", "7", (1.0, 2.0))
    assert seconds == 1.5
