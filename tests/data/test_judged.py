"""What reward models learn from: margins of pairs, ends of answers, labelled steps; and what cannot be learned from."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from polm.data.build import build_files_dataset
from polm.data.examples import build_preference_trees, cut_padding
from polm.data.readers import read_preferences, read_stepwise, write_json, write_jsonl
from polm.data.records import Preference, Stepwise, build_row
from polm.data.steps import build_step_trees, encode_separator, encode_steps, split_steps
from polm.errors import DataError, UserError
from polm.recipe_data import FilesData, MixedSource

ASK = [{"role": "user", "content": "add 1 and 2 ."}]
CONTEXT: dict[str, Any] = {"context": 64, "too_long": "error"}


# ---- margins ---------------------------------------------------------------------------------------------------------


def read_pair(folder: Path, **columns: Any) -> Preference:
    write_jsonl(folder / "preferences.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", **columns}])
    return read_preferences(folder / "preferences.jsonl")[0]


@pytest.mark.parametrize(("given", "margin"), [({}, 0.0), ({"margin": None}, 0.0), ({"margin": 2}, 2.0)])
def test_a_margin_is_kept(tmp_path: Path, given: dict[str, Any], margin: float) -> None:
    pair = read_pair(tmp_path, **given)
    assert pair.margin == margin
    assert build_row(pair).get("margin", 0.0) == margin


@pytest.mark.parametrize("margin", [-1.0, "much", True, [1]])
def test_a_margin_that_is_none(tmp_path: Path, margin: Any) -> None:
    with pytest.raises(DataError, match=r"preferences.jsonl:1: (margin must be a number of at least 0|margin)"):
        read_pair(tmp_path, margin=margin)


def test_a_margin_goes_through_the_data_stage(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "margin": i} for i in range(3)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    transcripts = [
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b", "margin": 0.5}
    ]
    write_jsonl(tmp_path / "hh.jsonl", transcripts)
    sources = tuple(MixedSource(path=str(tmp_path / name)) for name in ("mine.jsonl", "hh.jsonl"))
    summary = build_files_dataset(FilesData(source="files", preferences=sources), tmp_path / "out")
    assert [p.margin for p in read_preferences(tmp_path / "out" / "preferences.jsonl")] == [0.0, 1.0, 2.0, 0.5]
    assert not any("columns_ignored" in name for name in summary["ledger"])


# ---- ends of answers -------------------------------------------------------------------------------------------------


def test_only_the_end_of_an_answer_is_a_target(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ledger: Counter[str] = Counter()
    pairs = [Preference(ASK, "3", "1 + 2", 1.5), Preference(ASK, "3", "4")]
    trees = build_preference_trees(tiny_tokenizer, pairs, **CONTEXT, ledger=ledger, supervise="end")
    for tree in trees:
        for segment in tree[1:]:
            assert np.flatnonzero(segment.streams["weights"]).tolist() == [len(segment) - 1]
            assert segment.tokens[-1] == tiny_tokenizer.eos_token_id
    assert [tree[1].marks.get("margin") for tree in trees] == [1.5, None]
    assert ledger["margins"] == 1
    assert ledger["tokens_supervised"] == 4
    assert ledger["tokens_read"] == ledger["tokens_kept"] == sum(len(s) for tree in trees for s in tree)


def test_an_end_token_that_is_the_padding_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A sequence classifier skips it, so the answer is judged at the token before, and an empty answer at none."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    ids = np.array([5, 7, tokenizer.eos_token_id, tokenizer.eos_token_id])
    assert cut_padding(tokenizer, ids).tolist() == [5, 7]
    assert cut_padding(tokenizer, ids[2:]).tolist() == []
    ledger: Counter[str] = Counter()
    pairs = [Preference(ASK, "3", "4"), Preference(ASK, "", "4")]
    trees = build_preference_trees(tokenizer, pairs, **CONTEXT, ledger=ledger, supervise="end")
    assert len(trees) == 1
    assert [len(segment) for segment in trees[0][1:]] == [1, 1]
    assert (ledger["dropped"], ledger["dropped_empty"]) == (1, 1)
    assert ledger["tokens_read"] == ledger["tokens_kept"] + ledger["tokens_lost"]


def test_equal_answers_are_dropped(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ledger: Counter[str] = Counter()
    pairs = [Preference(ASK, "3", "3"), Preference(ASK, "3", "4")]
    trees = build_preference_trees(tiny_tokenizer, pairs, **CONTEXT, ledger=ledger, supervise="end")
    assert len(trees) == 1
    assert (ledger["dropped"], ledger["dropped_equal"]) == (1, 1)


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1.0})
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1.0\n}\n'


# ---- steps -----------------------------------------------------------------------------------------------------------

STEPS = Stepwise(ASK, ("1 + 2 = 3", "#### 4"), (1.0, 0.0))


def build_trees(tokenizer: PreTrainedTokenizerFast, *records: Stepwise, **changes: Any) -> tuple[Any, Counter[str]]:
    ledger: Counter[str] = Counter()
    given = {**CONTEXT, "separator": ";", **changes}
    return build_step_trees(tokenizer, records, ledger=ledger, **given), ledger


def test_steps_end_with_the_separator(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ((prompt, answer),), ledger = build_trees(tiny_tokenizer, STEPS)
    (separator,) = encode_separator(tiny_tokenizer, ";")
    ends = np.flatnonzero(answer.streams["weights"])
    assert answer.tokens[ends].tolist() == [separator, separator]
    assert ends[-1] == len(answer) - 1
    assert answer.streams["labels"][ends].tolist() == [1.0, 0.0]
    first = tiny_tokenizer("1 + 2 = 3", add_special_tokens=False)["input_ids"]
    assert answer.tokens[: ends[0]].tolist() == first
    assert tiny_tokenizer.decode(prompt.tokens).count("add")
    assert (ledger["steps_read"], ledger["tokens_supervised"]) == (2, 2)
    assert ledger["tokens_read"] == ledger["tokens_kept"] == len(prompt) + len(answer)


def test_the_last_step_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ((_, answer),), _ = build_trees(tiny_tokenizer, STEPS, last_only=True)
    assert np.flatnonzero(answer.streams["weights"]).tolist() == [len(answer) - 1]
    assert answer.streams["labels"][-1] == 0.0


def test_truncation_loses_whole_steps(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ((prompt, answer),), _ = build_trees(tiny_tokenizer, STEPS)
    first_end = int(np.flatnonzero(answer.streams["weights"])[0])
    room = len(prompt) + first_end + 2  # into the second step
    ((_, cut),), ledger = build_trees(tiny_tokenizer, STEPS, context=room, too_long="truncate")
    assert np.flatnonzero(cut.streams["weights"]).tolist() == [first_end]
    assert (ledger["steps_lost"], ledger["truncated"]) == (1, 1)
    assert ledger["tokens_read"] == ledger["tokens_kept"] + ledger["tokens_lost"]
    with pytest.raises(DataError, match=r"no token is supervised \(1 examples read, 1 dropped\)"):
        build_trees(tiny_tokenizer, STEPS, context=len(prompt) + 1, too_long="truncate")
    with pytest.raises(DataError, match=r"record 0 .*set too_long"):
        build_trees(tiny_tokenizer, STEPS, context=room)


def test_a_step_that_holds_the_separator_is_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    _, ledger = build_trees(tiny_tokenizer, Stepwise(ASK, ("1 ; 2", "3"), (1.0, 1.0)))
    assert ledger["steps_with_separator"] == 1


def test_what_a_model_wrote_is_split() -> None:
    assert split_steps("1 + 2 = 3;; #### 3 ; ", ";") == ["1 + 2 = 3", " #### 3 "]
    assert split_steps(" ", ";") == []


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (("1", " "), r"record 1: completions\[1\] is an empty step"),
        (("1 <|eos|>", "2"), r"record 1: completions\[0\] holds the control token <\|eos\|>"),
    ],
)
def test_steps_that_cannot_be_learned_from(
    tiny_tokenizer: PreTrainedTokenizerFast, steps: tuple[str, ...], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        build_trees(tiny_tokenizer, STEPS, Stepwise(ASK, steps, (1.0, 0.0)))


def test_a_separator_without_a_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"the separator '\\n' has no token with this tokenizer"):
        encode_separator(tiny_tokenizer, "\n")
    ids, ends = encode_steps(tiny_tokenizer, [], encode_separator(tiny_tokenizer, ";"))
    assert (len(ids), len(ends)) == (0, 0)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"labels": [True]}, "2 completions and 1 labels; each step needs one label"),
        ({"labels": []}, "2 completions and 0 labels"),
        ({"labels": [True, 2]}, r"labels\[1\] must be true, false or a number from 0"),
        ({"labels": None}, "no column labels; found prompt, completions"),
        ({"completions": []}, "completions must be a list of strings with at least one"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False], **columns}
    write_jsonl(tmp_path / "stepwise.jsonl", [row])
    with pytest.raises(DataError, match=rf"stepwise.jsonl:1: .*{match}"):
        read_stepwise(tmp_path / "stepwise.jsonl")


def test_a_file_without_labels(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "stepwise.jsonl", [{"prompt": "q", "completions": ["a"]}])
    with pytest.raises(DataError, match=r"stepwise.jsonl:1: no column labels; found prompt, completions"):
        read_stepwise(tmp_path / "stepwise.jsonl")
