"""Judged answers: reading them, their trees, and the answers to other prompts beside them. One word is one token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polm.data.examples import Ledger, add_mismatched, build_feedback_trees, build_preference_trees
from polm.data.readers import Preference, is_feedback, read_feedback
from polm.data.records import Feedback
from polm.errors import DataError
from polm.tokens import Tree

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *"abcdefghij"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def build_words(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


def ask(prompt: str, completion: str, label: bool) -> Feedback:
    return Feedback([{"role": "user", "content": prompt}], completion, label)


def spell(tree: Tree) -> list[str]:
    return [" ".join(WORDS[i] for i in segment.tokens) for segment in tree]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b", "completion": "c", "label": True},
        {"prompt": [USER], "completion": "c", "label": True},
        {"prompt": [USER], "completion": [BOT], "label": True},
        {"messages": [USER, BOT], "label": True},
    ],
)
def test_layouts(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, row, {**row, "label": False})
    assert read_feedback(path) == [ask("a b", "c", True), ask("a b", "c", False)]
    assert is_feedback(path)
    assert not is_feedback(write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "feedback.jsonl:2: no column label; found prompt, completion"),
        ({"prompt": "a", "completion": "b", "label": 2}, "feedback.jsonl:2: label"),
        ({"prompt": "a", "completion": "b", "label": None}, "no column label; found prompt, completion"),
        ({"prompt": "a", "label": True}, "feedback.jsonl:2: no column completion"),
        ({"prompt": [USER], "label": True}, "feedback.jsonl:2: no column completion"),
        ({"prompt": "a", "completion": 3, "label": True}, "completion must be a string, found a number"),
        ({"prompt": [USER], "completion": 3, "label": True}, "completion must be a string, found a number"),
        ({"messages": [USER, BOT, USER], "label": True}, "found user, assistant, user"),
        ({"messages": [BOT], "label": True}, "must be the assistant's text after a prompt; found assistant"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"prompt": "a", "completion": "b", "label": True}, row)
    with pytest.raises(DataError, match=message):
        read_feedback(path)


# ---- trees -----------------------------------------------------------------------------------------------------------


def build(feedback: list[Feedback], context: int = 20, too_long: Any = "error") -> tuple[list[Tree], Ledger]:
    ledger: Ledger = Counter()
    trees = build_feedback_trees(build_words(), feedback, context=context, too_long=too_long, ledger=ledger)
    assert ledger["tokens_read"] == ledger["tokens_kept"] + ledger["tokens_lost"]
    assert ledger["read"] == ledger["kept"] + ledger["dropped"]
    return trees, ledger


def test_a_judged_answer_is_a_prompt_with_one_child() -> None:
    trees, ledger = build([ask("a b", "c", True), ask("a", "d e", False)])
    assert [spell(tree) for tree in trees] == [["<user> a b <bot>", "c <eos>"], ["<user> a <bot>", "d e <eos>"]]
    assert [tree[1].marks["sign"] for tree in trees] == [1.0, -1.0]
    assert +ledger == Counter(read=2, kept=2, tokens_read=12, tokens_kept=12, tokens_supervised=5, tokens_masked=7)


def test_long_judged_answers() -> None:
    records = [ask("a", "b c d", True), ask("a", "b", False), ask("a", "c", True)]
    trees, ledger = build(records, 5, "truncate")
    assert [len(tree[1]) for tree in trees] == [2, 2, 2]
    assert (ledger["truncated"], ledger["tokens_lost"]) == (1, 2)
    trees, ledger = build(records, 5, "drop")
    assert (len(trees), ledger["dropped"], ledger["tokens_lost"]) == (2, 1, 7)
    with pytest.raises(DataError, match=r"record 0 \(its prompt: 3 tokens\) has 7 tokens, and the context is 5"):
        build(records, 5)


def test_one_label_left_is_an_error() -> None:
    records = [ask("a", "b c d", True), ask("a", "b", False)]
    with pytest.raises(DataError, match="0 answers labelled true and 1 labelled false are left of 2"):
        build(records, 5, "drop")


def test_a_template_that_writes_nothing_for_an_answer() -> None:
    silent = build_words(TEMPLATE.replace(" <eos>{% endgeneration %}", "{% endgeneration %}"))
    pairs = [Preference([{"role": "user", "content": "a"}], "b", "")]
    with pytest.raises(DataError, match="pair 0: none of the 3 tokens of the conversation is the assistant's"):
        build_preference_trees(silent, pairs, context=20, too_long="error", ledger=Counter())
    records = [ask("a", "b", True), ask("a", "", False)]
    with pytest.raises(DataError, match=r"record 1: none of the 3 tokens .* its messages are empty"):
        build_feedback_trees(silent, records, context=20, too_long="error", ledger=Counter())


# ---- answers to other prompts ----------------------------------------------------------------------------------------


def mismatch(trees: list[Tree], ledger: Ledger, context: int = 20) -> list[list[str]]:
    """The mismatched answers of each tree."""
    out = []
    for before, tree in zip(trees, add_mismatched(trees, context=context, ledger=ledger), strict=True):
        assert tree[: len(before)] == before
        added = tree[len(before) :]
        assert all(segment.parent == 0 and dict(segment.marks) == {"mismatched": 1.0} for segment in added)
        assert all((segment.streams["weights"] == 1.0).all() for segment in added)
        out.append(spell(added))
    return out


def test_each_prompt_gets_the_answers_of_the_one_before() -> None:
    trees, ledger = build([ask("a", "b", True), ask("c", "d e", False), ask("f", "g h i", True)])
    kept = ledger["tokens_kept"]
    assert mismatch(trees, ledger) == [["g h i <eos>"], ["b <eos>"], ["d e <eos>"]]
    assert ledger["tokens_mismatched"] == 9
    assert ledger["tokens_kept"] == kept + 9 == ledger["tokens_supervised"] + ledger["tokens_masked"]
    assert ledger["tokens_supervised"] == 9


def test_answers_to_the_same_prompt_are_passed_over() -> None:
    """The last prompt is the first one again, as after a shuffle, and neighbours share a prompt."""
    prompts = "aabba"
    trees, ledger = build([ask(p, c, i % 2 == 0) for i, (p, c) in enumerate(zip(prompts, "fghij", strict=True))])
    assert mismatch(trees, ledger) == [["i <eos>"], ["i <eos>"], ["g <eos>"], ["g <eos>"], ["i <eos>"]]


def test_both_answers_of_a_pair_are_handed_on_and_cut_to_the_context() -> None:
    pairs = [
        Preference([{"role": "user", "content": p}], c, r) for p, c, r in (("a b c d", "e", "f"), ("a", "g h i", "j"))
    ]
    ledger: Ledger = Counter()
    trees = build_preference_trees(build_words(), pairs, context=8, too_long="error", ledger=ledger)
    assert mismatch(trees, ledger, 8) == [["g h", "j <eos>"], ["e <eos>", "f <eos>"]]
    assert ledger["mismatched_cut"] == 1


def test_one_prompt_is_an_error() -> None:
    trees, ledger = build([ask("a", "b", True), ask("a", "c", False)])
    with pytest.raises(DataError, match="all of the data has one prompt"):
        add_mismatched(trees, context=20, ledger=ledger)
