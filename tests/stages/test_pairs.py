"""`polm pairs`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.readers import read_preferences, read_prompts
from polm.errors import DataError
from polm.recipe import PairsSettings
from polm.rewards.base import Reward
from polm.rewards.selection import Answer
from polm.rewards.verify import verify_many
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


def test_statistical_rejection_sampling(artifact: Any, read_manifest: Any, read_rows: Any, tmp_path: Path) -> None:
    """Four of eight answers are accepted; a tournament of four has three pairs less the ties."""
    changes = {"choose": "rso", "samples": 8, "rso_accepted": 4, "rso_rounds": "all", "rso_beta": 0.5}
    settings = PairsSettings(num_prompts=12, max_new_tokens=8, temperature=1.5, precision="fp32", **changes)
    artifact.run("pairs", settings, artifact.inputs("pairs"), tmp_path / "out")
    found = read_preferences(tmp_path / "out" / "preferences.jsonl")
    per_prompt = Counter(pair.prompt[0]["content"] for pair in found)
    assert max(per_prompt.values()) <= 3
    assert all((len(pair.chosen) % 2, len(pair.rejected) % 2) == (0, 1) for pair in found)
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert ledger["prompts_without"] == 12 - len(per_prompt)
    fit = 96 - sum(ledger.get(f"dropped_{reason}", 0) for reason in ("unjudged", "empty", "duplicate"))
    assert ledger["dropped_not_accepted"] <= fit - 4  # at least one prompt had four
    groups = read_rows(tmp_path / "out" / "answers.jsonl")
    written = {(group["prompt"], answer["text"]) for group in groups for answer in group["answers"]}
    assert {(p.prompt[0]["content"], p.chosen) for p in found} <= written


def test_knobs_of_the_other_way_are_refused() -> None:
    resolved = PairsSettings(choose="rso")
    assert (resolved.rso_beta, resolved.rso_accepted, resolved.rso_rounds) == (0.5, 8, "first")
    assert resolved.pairs_per_prompt is None
    assert PairsSettings().pairs_per_prompt == 1
    with pytest.raises(ValueError, match=r"rso_beta is 0.3, and choose: best_worst does not read it; leave it out"):
        PairsSettings(rso_beta=0.3)
    with pytest.raises(ValueError, match=r"pairs_per_prompt is 2, and choose: rso does not read it"):
        PairsSettings(choose="rso", pairs_per_prompt=2)


def judged(prompt: int, text: str, status: str) -> Answer:
    value = {"right": 1.0, "wrong": 0.0, "unparsed": 0.0}.get(status)
    return Answer(prompt, text, False, Reward(value, status))  # type: ignore[arg-type]


def test_who_stands_where() -> None:
    """Time-outs, errors and empty answers are on neither side; equal texts count once."""
    samples = [
        (0, "a", "right"), (0, "a", "right"), (0, "b", "wrong"), (0, "c", "unparsed"),
        (1, "a", "right"), (1, "b", "timeout"), (1, "c", "error"), (1, " ", "wrong"),
        (2, "a", "wrong"), (2, "b", "wrong"),
        (3, "a", "right"), (3, "b", "right"), (3, "c", "wrong"), (3, "d", "wrong"), (3, "e", "wrong"),
    ]  # fmt: skip
    answers = [judged(*sample) for sample in samples]
    dropped: Counter[str] = Counter()
    found = build_pairs(PairsSettings(pairs_per_prompt=5), answers, dropped)
    assert {number: len(pairs) for number, pairs in found.items()} == {0: 1, 3: 2}
    assert found[0][0][0].text == "a"
    assert found[0][0][1].text in "bc"
    assert {better.text for better, _ in found[3]} == {"a", "b"}
    assert len({worse.text for _, worse in found[3]}) == 2
    assert dropped == {"duplicate": 1, "unjudged": 2, "empty": 1}
    one = build_pairs(PairsSettings(), answers, Counter())
    assert {number: len(pairs) for number, pairs in one.items()} == {0: 1, 3: 1}
    assert build_pairs(PairsSettings(pairs_per_prompt=5), answers, Counter()) == found
    orders = {str(build_pairs(PairsSettings(pairs_per_prompt=5, seed=s), answers, Counter())) for s in range(8)}
    assert len(orders) > 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (recipe_folder() / "pairs").glob("*.yaml")))
def test_shipped_recipes_run(name: str, artifact: Any, tmp_path: Path) -> None:
    words = ["num_prompts=6", "max_new_tokens=8", "precision=fp32", "temperature=1.5"]
    settings = load_settings(PairsSettings, find_recipe(f"pairs/{name}"), words, section="pairs")
    manifest = artifact.run("pairs", settings, artifact.inputs("pairs"), tmp_path / "out")
    assert len(read_preferences(tmp_path / "out" / "preferences.jsonl")) == manifest["summary"]["pairs"] > 0
    assert (manifest["ledger"].get("dropped_not_accepted", 0) > 0) == (settings.choose == "rso")
