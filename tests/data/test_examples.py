"""From texts to trees, with exact ledgers. One word is one token; a document ends with the end token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polm.data.examples import (
    Ledger,
    Policy,
    build_conversation_trees,
    build_document_trees,
    build_preference_trees,
    encode_document,
    encode_prompt,
)
from polm.data.records import Conversation, Preference
from polm.errors import DataError
from polm.tokens import Tree

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *"abcdefghij"]
EOS, USER, BOT, A = 1, 3, 4, 5
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def check_sums(ledger: Ledger) -> None:
    """Every token that was read is kept or counted as lost, and what is kept is a target or context."""
    assert ledger["tokens_kept"] == ledger["tokens_supervised"] + ledger["tokens_masked"], ledger
    assert ledger["tokens_read"] == ledger["tokens_kept"] + ledger["tokens_lost"], ledger


# ---- documents -----------------------------------------------------------------------------------------------------


def test_a_document_begins_and_ends(words: PreTrainedTokenizerFast) -> None:
    assert encode_document(words, "a b").tolist() == [5, 6, EOS]
    assert encode_prompt(words, "a b").tolist() == [5, 6]
    words.bos_token = "<bot>"
    assert encode_document(words, "a b").tolist() == [BOT, 5, 6, EOS]
    assert encode_prompt(words, "a b").tolist() == [BOT, 5, 6]


TEXTS = ["a b", "a b c d e f g", "a b c ?"]  # with the end token 3, 8 and 5 tokens; ? is unknown
READ = {"read": 3, "tokens_read": 16, "tokens_unknown": 1}


@pytest.mark.parametrize(
    ("policy", "lengths", "ledger"),
    [
        (
            "truncate",
            [3, 5, 5],
            {
                "kept": 3,
                "truncated": 1,
                "tokens_lost": 3,
                "tokens_kept": 13,
                "tokens_supervised": 10,
                "tokens_masked": 3,
            },
        ),
        (
            "drop",
            [3, 5],
            {"kept": 2, "dropped": 1, "tokens_lost": 8, "tokens_kept": 8, "tokens_supervised": 6, "tokens_masked": 2},
        ),
        # The second is cut into 5 and 3; each piece's first token is context.
        (
            "split",
            [3, 5, 3, 5],
            {"kept": 4, "split": 1, "tokens_lost": 0, "tokens_kept": 16, "tokens_supervised": 12, "tokens_masked": 4},
        ),
    ],
)
def test_policies_for_long_documents(
    words: PreTrainedTokenizerFast, policy: Policy, lengths: list[int], ledger: dict[str, int]
) -> None:
    found: Ledger = Counter()
    trees = build_document_trees(words, TEXTS, context=5, too_long=policy, ledger=found)
    assert [len(tree[0]) for tree in trees] == lengths
    assert +found == Counter({**READ, **ledger}) - Counter({"tokens_lost": 0})
    check_sums(found)
    if policy == "truncate":
        assert trees[1][0].tokens.tolist() == ids_of("a b c d e")


def test_a_piece_of_one_token_is_lost_and_counted(words: PreTrainedTokenizerFast) -> None:
    ledger: Ledger = Counter()
    trees = build_document_trees(words, ["a b c d e f", ""], context=3, too_long="split", ledger=ledger)
    # 7 tokens are 3 + 3 + 1; the empty document is its end token alone.
    assert [tree[0].tokens.tolist() for tree in trees] == [ids_of("a b c"), ids_of("d e f")]
    assert ledger["tokens_lost"] == 2
    check_sums(ledger)


def test_the_policy_error_names_the_document_and_the_cure(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"document 1 has 8 tokens, and the context is 5.*too_long: truncate.*bin_tokens"
    ):
        build_document_trees(words, TEXTS, context=5, too_long="error", ledger=Counter())


def test_no_document_left_is_an_error(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no token is supervised \(1 examples read, 1 dropped\)"):
        build_document_trees(words, ["a b c d"], context=2, too_long="drop", ledger=Counter())
    with pytest.raises(DataError, match="no token is supervised"):
        build_document_trees(words, [], context=2, too_long="drop", ledger=Counter())


# ---- conversations -------------------------------------------------------------------------------------------------


def talk(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)])


@pytest.mark.parametrize(("train_on", "expected"), [("all", "b <eos> d e <eos>"), ("last", "d e <eos>")])
def test_only_the_assistant_is_trained(words: PreTrainedTokenizerFast, train_on: Any, expected: str) -> None:
    ledger: Ledger = Counter()
    (tree,) = build_conversation_trees(
        words, [talk("a", "b", "c", "d e")], context=20, too_long="error", train_on=train_on, ledger=ledger
    )
    (segment,) = tree
    assert segment.tokens.tolist() == ids_of("<user> a <bot> b <eos> <user> c <bot> d e <eos>")
    assert segment.tokens[segment.streams["weights"] == 1.0].tolist() == ids_of(expected)
    count = len(expected.split())
    assert +ledger == Counter(
        read=1, tokens_read=11, kept=1, tokens_kept=11, tokens_supervised=count, tokens_masked=11 - count
    )


CHATS = [talk("a", "b"), talk("a b c d e f", "g h"), talk("a", "b c d e f g")]  # 5, 11 and 10 tokens


def test_truncated_conversations(words: PreTrainedTokenizerFast) -> None:
    """Cut at 8: the second has lost its whole answer (no token to learn is left), the third the end of it."""
    ledger: Ledger = Counter()
    trees = build_conversation_trees(words, CHATS, context=8, too_long="truncate", train_on="all", ledger=ledger)
    assert [tree[0].tokens.tolist() for tree in trees] == [
        ids_of("<user> a <bot> b <eos>"),
        ids_of("<user> a <bot> b c d e f"),
    ]
    expected = {"read": 3, "kept": 2, "truncated": 2, "dropped": 1, "dropped_unsupervised": 1}
    tokens = {"tokens_read": 26, "tokens_kept": 13, "tokens_lost": 13, "tokens_supervised": 7, "tokens_masked": 6}
    assert +ledger == Counter({**expected, **tokens})


def test_dropped_conversations(words: PreTrainedTokenizerFast) -> None:
    ledger: Ledger = Counter()
    build_conversation_trees(words, CHATS, context=8, too_long="drop", train_on="all", ledger=ledger)
    expected = {"read": 3, "kept": 1, "dropped": 2}
    tokens = {"tokens_read": 26, "tokens_kept": 5, "tokens_lost": 21, "tokens_supervised": 2, "tokens_masked": 3}
    assert +ledger == Counter({**expected, **tokens})


def test_long_conversations_by_error_and_split(words: PreTrainedTokenizerFast) -> None:
    """A conversation cannot be split: its answer would lose its question."""
    for policy in ("error", "split"):
        with pytest.raises(DataError, match=r"conversation 1 has 11 tokens, and the context is 8"):
            build_conversation_trees(
                words,
                CHATS,
                context=8,
                too_long=policy,
                train_on="all",
                ledger=Counter(),  # type: ignore[arg-type]
            )


def test_nothing_supervised_is_an_error(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no token is supervised \(1 examples read, 1 dropped\).*roles.*template"):
        build_conversation_trees(
            words, [talk("a b c d", "e")], context=4, too_long="truncate", train_on="all", ledger=Counter()
        )


# ---- preference pairs ----------------------------------------------------------------------------------------------


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference([{"role": "user", "content": prompt}], chosen, rejected)


def build_pairs(
    words: PreTrainedTokenizerFast, pairs: list[Preference], context: int, too_long: Policy
) -> tuple[list[Tree], Ledger]:
    ledger: Ledger = Counter()
    trees = build_preference_trees(words, pairs, context=context, too_long=too_long, ledger=ledger)
    check_sums(ledger)
    assert ledger["read"] == ledger["kept"] + ledger["dropped"]
    return trees, ledger


def test_a_pair_is_a_prompt_with_two_children(words: PreTrainedTokenizerFast) -> None:
    (tree,), ledger = build_pairs(words, [pair("a b", "c", "d e")], 20, "error")
    prompt, chosen, rejected = tree
    assert prompt.tokens.tolist() == ids_of("<user> a b <bot>")
    assert chosen.tokens.tolist() == ids_of("c <eos>")
    assert rejected.tokens.tolist() == ids_of("d e <eos>")
    assert (chosen.parent, rejected.parent) == (0, 0)
    assert (chosen.marks["sign"], rejected.marks["sign"]) == (1.0, -1.0)
    assert +ledger == Counter(read=1, kept=1, tokens_read=9, tokens_kept=9, tokens_supervised=5, tokens_masked=4)


def test_equal_answers_are_dropped_and_counted(words: PreTrainedTokenizerFast) -> None:
    trees, ledger = build_pairs(words, [pair("a", "b", "b"), pair("a", "b", "c")], 20, "error")
    assert len(trees) == 1
    assert (ledger["dropped"], ledger["dropped_equal"]) == (1, 1)
    assert ledger["tokens_lost"] == 7


def test_long_answers_of_a_pair(words: PreTrainedTokenizerFast) -> None:
    """Context 6: the prompt takes 3, so an answer has room for 3 with its end token."""
    pairs = [pair("a", "b c d", "e"), pair("a", "b c d e", "f g h"), pair("a", "b", "c")]  # 9, 12 and 7 tokens
    trees, ledger = build_pairs(words, pairs, 6, "truncate")
    assert [[len(segment) for segment in tree] for tree in trees] == [[3, 3, 2], [3, 3, 3], [3, 2, 2]]
    assert (ledger["truncated"], ledger["tokens_lost"], ledger["tokens_read"]) == (3, 1 + 2 + 1, 28)

    trees, ledger = build_pairs(words, pairs, 6, "drop")
    assert len(trees) == 1
    # A pair goes as a whole: two pairs and all of their tokens are lost.
    assert (ledger["dropped"], ledger["tokens_lost"]) == (2, 9 + 12)

    with pytest.raises(DataError, match=r"pair 0 \(its prompt: 3 tokens\) has 7 tokens, and the context is 6"):
        build_pairs(words, pairs, 6, "error")


def test_a_prompt_without_room_for_an_answer(words: PreTrainedTokenizerFast) -> None:
    pairs = [pair("a b c d", "e", "f"), pair("a", "b", "c")]
    trees, ledger = build_pairs(words, pairs, 6, "drop")
    assert len(trees) == 1
    assert (ledger["dropped"], ledger["tokens_lost"]) == (1, 10)
    for policy in ("error", "truncate"):  # a cut prompt would be another question
        with pytest.raises(DataError, match=r"pair 0 \(its prompt: 6 tokens\) has 8 tokens, and the context is 6"):
            build_pairs(words, pairs, 6, policy)  # type: ignore[arg-type]


def test_answers_that_differ_only_after_the_cut_are_dropped(words: PreTrainedTokenizerFast) -> None:
    """Cut at two tokens both answers are `b c`: such a pair would be a coin toss."""
    trees, ledger = build_pairs(words, [pair("a", "b c d", "b c e f"), pair("a", "b", "c")], 5, "truncate")
    assert len(trees) == 1
    assert (ledger["truncated"], ledger["dropped_equal"], ledger["tokens_lost"]) == (2, 1, 3 + 4 + 5)


def test_unknown_words_are_counted_everywhere(words: PreTrainedTokenizerFast) -> None:
    _, ledger = build_pairs(words, [pair("?", "b ?", "c")], 20, "error")
    assert ledger["tokens_unknown"] == 2
    ledger = Counter()
    chats = [talk("a ?", "b ? ?")]
    build_conversation_trees(words, chats, context=20, too_long="error", train_on="all", ledger=ledger)
    assert ledger["tokens_unknown"] == 3


def test_an_end_token_named_as_unknown_is_not_counted() -> None:
    """GPT-2 names its end-of-text token as the unknown one, and never produces it for a word."""
    byte_like = Tokenizer(models.BPE({"a": 0, "b": 1, "<eos>": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_like, eos_token="<eos>", unk_token="<eos>")
    ledger: Ledger = Counter()
    build_document_trees(tokenizer, ["ab", "ba"], context=9, too_long="error", ledger=ledger)
    assert (ledger["tokens_read"], ledger["tokens_unknown"]) == (6, 0)


def test_only_equal_pairs_are_an_error(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no token is supervised \(1 examples read, 1 dropped\)"):
        build_preference_trees(words, [pair("a", "b", "b")], context=9, too_long="error", ledger=Counter())
