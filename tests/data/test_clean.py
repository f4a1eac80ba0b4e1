"""Duplicates and contamination, by hand."""

from __future__ import annotations

import pytest

from polm.data.clean import Contamination, fingerprint_record, split_tokens, split_words
from polm.data.records import Conversation, Document, Feedback, Preference, Prompt, Stepwise

LONG = "Natalia sold clips to 48 of her friends in April and then half as many in May"  # 16 words


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_what_counts_as_the_same() -> None:
    same = fingerprint_record(Document("a b\nc"))
    assert fingerprint_record(Document("  a  b c ", weight=0.5)) == same
    assert fingerprint_record(Document("e\u0301")) == fingerprint_record(Document("\u00e9"))
    assert fingerprint_record(Document("A b c")) != same
    pairs = [Preference([user("q")], "a", "b"), Preference([user("q")], "b", "a"), Preference([user("q a")], "", "b")]
    assert len({fingerprint_record(pair) for pair in pairs}) == 3
    assert fingerprint_record(Feedback([user("q")], "a", True)) != fingerprint_record(Feedback([user("q")], "a", False))
    steps = [Stepwise([user("q")], ("a", "b"), labels) for labels in ((1.0, 1.0), (1.0, 0.0))]
    assert fingerprint_record(steps[0]) != fingerprint_record(steps[1])
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        Conversation([user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}], tools=t)
        for t in ([], [call])
    ]
    assert fingerprint_record(chats[0]) != fingerprint_record(chats[1])
    assert fingerprint_record(Document("a")) != fingerprint_record(Prompt("a", "", "exact"))


def test_words() -> None:
    assert split_words("Don't PANIC, 3.5×２ größe!") == ["don", "t", "panic", "3", "5", "2", "grösse"]
    assert split_words("细胞理论 ab") == ["细", "胞", "理", "论", "ab"]
    assert split_tokens("2 + 3 = ?") == ["2", "+", "3", "=", "?"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LONG, True),
        ("Q: " + LONG.upper().replace(" ", "\n") + "?", True),
        (" ".join(LONG.split()[2:15]), True),  # thirteen words of it
        (" ".join(LONG.split()[2:14]), False),  # twelve
        (LONG.replace("48", "49"), False),  # another question: the longest run in common has eleven words
        ("clips to 48", False),
        ("", False),
    ],
)
def test_long_questions_are_found_by_thirteen_words(text: str, found: bool) -> None:
    index = Contamination({"gsm8k": [LONG]})
    assert index.find(Document(text)) == ({"gsm8k"} if found else set())


def test_short_questions_are_found_whole_with_their_signs() -> None:
    index = Contamination({"sums": ["2 + 3 ="], "words": ["What is it?", "", "!"]})
    assert index.find(Document("so 2 + 3 = 5")) == {"sums"}
    assert index.find(Document("so 12 + 3 = 5, 2 - 3 = 1, 2 3")) == set()
    assert index.find(Document("well, WHAT is\nit?")) == {"words"}
    assert index.find(Document("what is it")) == set()
    assert index.find(Conversation([user("hm"), {"role": "assistant", "content": "2+3=5 what is it?"}])) == {
        "sums",
        "words",
    }
    assert index.find(Conversation([user("2 +"), {"role": "assistant", "content": "3 ="}])) == set()  # two messages


def test_the_length_is_a_setting_and_benchmarks_share_ngrams() -> None:
    index = Contamination({"a": ["one two three four"], "b": ["zero one two three"]}, ngram=3)
    assert index.find(Document("one two three")) == {"a", "b"}
    assert index.find(Document("two three four")) == {"a"}
    assert index.find(Prompt("x", "y", "exact", solution="zero one two")) == {"b"}
    assert Contamination({"a": ["one two three four"]}, ngram=2).find(Document("three four")) == {"a"}
    with pytest.raises(ValueError, match="at least two words"):
        Contamination({}, ngram=1)
