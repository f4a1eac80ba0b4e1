"""What `polm data inspect` counts, by hand."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polm.data.inspection import Part, Piece, compute_histogram, inspect_source, split_pieces
from polm.data.readers import read_stepwise, write_jsonl
from polm.data.steps import build_step_trees
from polm.errors import DataError

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *"abcdefghij"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", additional_special_tokens=["<user>", "<bot>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write(path: Path, *rows: Any) -> str:
    write_jsonl(path, rows)
    return str(path)


def test_conversations_in_tokens(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"messages": [user("a"), bot("b c"), user("d"), bot("e", weight=0)], "id": 1},  # 11 tokens, 3 trained on
        {"messages": [user("a"), bot("b c"), user("d"), bot("e", weight=0)]},
        {"messages": [user("a"), bot("<user> b")]},  # would forge a turn
        {"messages": [user("a"), bot("b", weight=0.5)]},  # 5 tokens
        {"messages": [user("a")]},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    found = inspect_source(path, tokenizer=words, context=8)
    assert (found.num_rows, found.num_read, found.num_refused, found.num_duplicates) == (5, 3, 2, 1)
    assert found.lengths.tolist() == [11, 11, 5]
    assert (found.units_supervised, found.num_over, found.units_over) == (3 + 3 + 2, 2, 6)
    assert found.reasons[0].startswith(f"{path}:3: message 1 (assistant) contains '<user>'")
    assert found.reasons[1].startswith(f"{path}:5: no assistant message")
    expected = {
        "messages of user": 5,
        "messages of assistant": 5,
        "answers of weight 0": 2,
        "answers of another weight than 0 and 1": 1,
        "columns_ignored/id": 1,
    }
    assert {name: count for name, count in found.counts.items() if count} == expected
    assert found.example_place == f"{path}:1"
    ((name, pieces),) = found.example
    assert name == "conversation"
    assert pieces == [
        Piece("<user> a <bot>", 0.0, 3),
        Piece("b", 1.0),
        Piece("c", 1.0),
        Piece("<eos>", 1.0),
        Piece("<user> d <bot> e <eos>", 0.0, 5),
    ]
    ((_, pieces),) = inspect_source(path, tokenizer=words, example=3).example  # the third cannot be used
    assert pieces[1:] == [Piece("b", 0.5), Piece("<eos>", 0.5)]


def test_other_records_in_tokens(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d e f"}
    found = inspect_source(write(tmp_path / "a.jsonl", pair), tokenizer=words, context=7)
    assert found.lengths.tolist() == [4 + 4]  # the prompt with the longer reply
    assert (found.units_supervised, found.num_over, found.units_over) == (2 + 4, 1, 1)
    assert [(name, [p.text for p in pieces]) for name, pieces in found.example] == [
        ("prompt", ["<user> a b <bot>"]),
        ("chosen", ["c", "<eos>"]),
        ("rejected", ["d", "e", "f", "<eos>"]),
    ]
    found = inspect_source(write(tmp_path / "b.jsonl", {"text": "a b", "weight": 2}), tokenizer=words)
    assert found.example == [("document", [Piece("a", 0.0), Piece("b", 2.0), Piece("<eos>", 2.0)])]
    feedback = {"prompt": "a", "completion": "b", "label": False}
    found = inspect_source(write(tmp_path / "c.jsonl", feedback), tokenizer=words)
    assert (found.counts["label false"], found.units_supervised) == (1, 2)
    assert found.example[0][0] == "label false"
    steps = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
    found = inspect_source(write(tmp_path / "d.jsonl", steps), tokenizer=words)
    assert (found.counts["steps"], found.counts["steps with a label below 1"], found.units_supervised) == (2, 1, 2)
    found = inspect_source(write(tmp_path / "e.jsonl", {"prompt": "a", "answer": "3"}), tokenizer=words)
    assert (found.counts["verifier math"], found.units_supervised, found.lengths.tolist()) == (1, 0, [3])


@pytest.mark.parametrize(("known", "separator"), [(";", ";"), ("\n", "\n")])
def test_steps_are_shown_as_the_stage_trains_on_them(
    words: PreTrainedTokenizerFast, tmp_path: Path, known: str, separator: str
) -> None:
    """One token a step. The separator is the stage's own, or `;` where the tokenizer has no token for that."""
    words.add_tokens([AddedToken(known, normalized=False)])
    row = {"prompt": "a b", "completions": ["c d", "e"], "labels": [True, 0.5]}
    path = write(tmp_path / "a.jsonl", row)
    found = inspect_source(path, tokenizer=words, context=8)
    assert found.example == [
        ("prompt", [Piece("<user> a b <bot>", 0.0, 4)]),
        ("steps, labels 1, 0.5", [Piece("c d", 0.0, 2), Piece(separator, 1.0), Piece("e", 0.0), Piece(separator, 1.0)]),
    ]
    assert (found.lengths.tolist(), found.units_supervised, found.units_over) == ([9], 2, 1)
    (tree,) = build_step_trees(
        words, read_stepwise(Path(path)), separator=separator, context=9, too_long="error", ledger=Counter()
    )
    assert [len(segment) for segment in tree] == [4, 5]
    assert np.flatnonzero(tree[1].streams["weights"]).tolist() == [2, 4]
    found = inspect_source(path)
    assert found.example[1:] == [
        ("step, label 1", [Piece("c d", 0.0), Piece("<separator>", 1.0)]),
        ("step, label 0.5", [Piece("e", 0.0), Piece("<separator>", 1.0)]),
    ]
    with pytest.raises(DataError, match=r"completions\[1\] is an empty step"):
        inspect_source(write(tmp_path / "b.jsonl", {**row, "completions": ["c", " "]}), tokenizer=words)


def test_without_a_tokenizer_words_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [user("one two"), bot("three"), user("x"), bot("y z", weight=0)]})
    found = inspect_source(path)
    assert (found.unit, found.lengths.tolist(), found.units_supervised) == ("words", [6], 1)
    assert found.counts["characters"] == len("one twothreexy z")
    assert found.example == [
        ("user", [Piece("one two", 0.0)]),
        ("assistant", [Piece("three", 1.0)]),
        ("user", [Piece("x", 0.0)]),
        ("assistant", [Piece("y z", 0.0)]),
    ]
    with pytest.raises(DataError, match=r"a context is counted in tokens: .*--tokenizer"):
        inspect_source(path, context=9)
    with pytest.raises(DataError, match=r"none of the 2 rows can be used\. .*b\.jsonl:1: no assistant message"):
        inspect_source(write(tmp_path / "b.jsonl", {"messages": [user("a")]}, {"messages": [user("b")]}))


def test_characters_of_several_tokens_are_shown_as_one() -> None:
    """One byte is one token: é has two of them, and only together they are text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = np.array(tokenizer("aéb😊")["input_ids"])
    pieces = split_pieces(tokenizer, Part("x", ids, np.ones(len(ids), np.float32)))
    assert pieces == [Piece("a", 1.0), Piece("é", 1.0, 2), Piece("b", 1.0), Piece("😊", 1.0, 4)]
    weights = np.array([0, 1, 0.5, 0, 0, 0, 0, 0], np.float32)  # in the middle of a character
    pieces = split_pieces(tokenizer, Part("x", ids, weights))
    assert [(p.weight, p.num_tokens) for p in pieces] == [(0, 1), (1, 1), (0.5, 1), (0, 5)]


def test_histogram() -> None:
    assert compute_histogram(array("q", [3])) == [(3, 3, 1)]
    assert compute_histogram(array("q", [1, 1, 2, 4])) == [(1, 1, 2), (2, 2, 1), (3, 3, 0), (4, 4, 1)]
    bins = compute_histogram(array("q", range(5, 105)))
    assert bins == [(5 + 10 * i, 14 + 10 * i, 10) for i in range(10)]
