"""Tokenizer training: what comes back after encoding and decoding, what is saved, what counts as the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from polm.errors import DataError, ModelError, UserError
from polm.text.tokenizer import (
    JOINER,
    count_unknown,
    fingerprint_tokenizer,
    normalise_words,
    require_same_tokenizer,
    train_tokenizer,
)

J = JOINER
TEXTS = [
    "What is 47 + 8 ? It is 55 .",
    "x = 47, (a+b) and ((N0*N1)-2)/3 is \\boxed{3.14} #### 1,000",
    "don't wait... x7 or x 7 or 7x? caf\u00e9 cafe\u0301 _a a_b **bold** N105",
    "你好 世界 12你好3 \N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL} ½ ทดสอบ",
]
HARD = "é\u0301 你好 \N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL} 1234\n\n  a\t\x00 <|eos|> ￭ <b>"


def train(kind: str, texts: list[str] | None = None, **settings: object) -> PreTrainedTokenizerFast:
    settings = {"vocab_size": 600, **settings}
    return train_tokenizer(texts or TEXTS, kind=kind, **settings)  # type: ignore[arg-type]


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_any_text_comes_back_exactly(kind: str) -> None:
    tokenizer = train(kind)
    for text in [*TEXTS, HARD, "", " ", "\n"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert count_unknown(tokenizer, text) == 0


def test_bpe_splits_digits_and_learns_words() -> None:
    tokenizer = train("bpe", ["total 4747 total 4747"] * 5, vocab_size=280)
    assert tokens(tokenizer, "total 4747") == ["total", "Ġ", "4", "7", "4", "7"]


def test_bpe_cuts_a_prompt_as_it_cuts_its_continuation() -> None:
    tokenizer = train("bpe", ["a\n\nb: c?\n"] * 9)
    assert "ĊĊ" in tokenizer.get_vocab()
    for prompt in ("a\n\n", "a\n", "b:", "a?\n\n", "a", "a 4"):
        head = tokenizer(prompt)["input_ids"]
        for answer in ("b", "4", "?") if prompt.endswith("\n") else (" b", " 4", " ?"):
            assert tokenizer(prompt + answer)["input_ids"][: len(head)] == head


def test_byte_is_one_token_a_byte() -> None:
    tokenizer = train("byte", ["a"], vocab_size=261)
    assert len(tokenizer) == 261
    assert len(tokenizer("é你a")["input_ids"]) == 2 + 3 + 1


def test_special_tokens_have_fixed_ids_and_roles() -> None:
    for kind in ("bpe", "byte", "word"):
        tokenizer = train(kind)
        specials = ["<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
        assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3, 4]
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|eos|>")
        assert tokenizer.unk_token == ("<|unk|>" if kind == "word" else None)
        assert tokenizer("<|user|>a<|eos|>")["input_ids"][:: len(tokenizer("<|user|>a")["input_ids"])] == [2, 1]
        assert tokenizer.decode([2, 1, 4], skip_special_tokens=True) == ""


def test_word_pieces_carry_the_joiner_where_they_touch() -> None:
    tokenizer = train("word")
    assert tokens(tokenizer, "x = 47, (a+b)") == [
        "x",
        "=",
        "4",
        f"{J}7",
        f"{J},",
        f"({J}",
        "a",
        f"{J}+{J}",
        "b",
        f"{J})",
    ]
    assert tokens(tokenizer, "47 4 7") == ["4", f"{J}7", "4", "7"]
    assert tokens(tokenizer, "x7 x 7 7x N105") == ["x7", "x", "7", "7", f"{J}x", "N105"]
    assert tokens(tokenizer, "((N0*N1)-2)")[:5] == ["(", f"{J}({J}", "N0", f"{J}*{J}", "N1"]
    assert tokens(tokenizer, "1,000 3.14") == [
        "1", f"{J},{J}", "0", f"{J}0", f"{J}0", "3", f"{J}.{J}", "1", f"{J}4",
    ]  # fmt: skip
    assert tokens(tokenizer, "#### 5") == ["####", "5"]
    assert tokens(tokenizer, "<|user|>What is 8 ?<|assistant|>") == [
        "<|user|>",
        "What",
        "is",
        "8",
        "?",
        "<|assistant|>",
    ]


@pytest.mark.parametrize("text", [*TEXTS, " a  b\n 47 ", "+", "47", ""])
def test_word_round_trip(text: str) -> None:
    tokenizer = train("word", [*TEXTS, "a b +"])
    ids = tokenizer(text)["input_ids"]
    assert count_unknown(tokenizer, text) == 0
    assert tokenizer.decode(ids) == normalise_words(text) == " ".join(text.split())
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_word_decodes_what_a_model_may_write() -> None:
    """Joiners with nothing to join must not reach the text, nor make numbers of separate digits."""
    tokenizer = train("word")
    for pieces, text in [
        ([f"{J}7", "8"], "7 8"),
        (["4", f"{J}7", f"{J}8"], "478"),
        ([f"({J}"], "("),
        ([f"({J}", f"{J}+{J}", "b"], "(+b"),
        (["<|assistant|>", f"{J}7"], "<|assistant|>7"),
    ]:
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids(pieces)) == text


def test_word_counts_unknown_words_and_keeps_ids_on_the_way_back() -> None:
    tokenizer = train("word", ["the cat sat ."])
    text = "the dog sat, cat ."
    assert tokens(tokenizer, text) == ["the", "<|unk|>", "sat", "<|unk|>", "cat", "."]
    assert count_unknown(tokenizer, text) == 2
    ids = tokenizer(text)["input_ids"]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_word_knows_every_number_and_every_gluing_of_a_seen_mark() -> None:
    tokenizer = train("word", ["4 + 7"])
    assert count_unknown(tokenizer, "9876543210 + 1") == 0
    assert count_unknown(tokenizer, "4+7") == 0
    assert count_unknown(tokenizer, "4-7") == 1


def test_word_vocabulary_is_cut_by_frequency_and_size() -> None:
    texts = ["b b b a a c"]
    smallest = 6 + 20 + 1
    assert set(train("word", texts, vocab_size=smallest).get_vocab()) & {"a", "b", "c"} == {"b"}
    assert set(train("word", texts, min_frequency=2).get_vocab()) & {"a", "b", "c"} == {"a", "b"}


def test_word_time_is_linear_in_long_numbers() -> None:
    tokenizer = train("word")
    assert tokens(tokenizer, "1" * 20_000) == ["1"] + [f"{J}1"] * 19_999
    long_name = "N" + "1" * 60
    assert train("word", [long_name]).decode(train("word", [long_name])(long_name)["input_ids"]) == long_name


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
def test_lowercase(kind: str) -> None:
    tokenizer = train(kind, ["What Is It"], lowercase=True)
    assert tokenizer.decode(tokenizer("what IS It<|eos|>")["input_ids"]) == (
        "what is it <|eos|>" if kind == "word" else "what is it<|eos|>"
    )


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
def test_special_tokens_in_the_texts_are_not_learned(kind: str) -> None:
    plain, marked = train(kind, ["ab", "cd"] * 3), train(kind, ["ab<|eos|>cd<|assistant|>"] * 3)
    assert plain.get_vocab() == marked.get_vocab()


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
@pytest.mark.parametrize("with_model", [False, True])
def test_saving_and_loading(kind: str, with_model: bool, tmp_path: Path) -> None:
    tokenizer = train(kind)
    tokenizer.save_pretrained(tmp_path)
    if with_model:
        Qwen3Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint_tokenizer(loaded) == fingerprint_tokenizer(tokenizer)
    require_same_tokenizer(tokenizer, loaded)
    for text in [*TEXTS, HARD]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
def test_training_is_deterministic(kind: str) -> None:
    assert fingerprint_tokenizer(train(kind)) == fingerprint_tokenizer(train(kind, list(TEXTS)))


def test_texts_may_be_a_generator() -> None:
    assert fingerprint_tokenizer(
        train_tokenizer((text for text in TEXTS), kind="bpe", vocab_size=300)
    ) == fingerprint_tokenizer(train("bpe", vocab_size=300))


def test_fingerprint_sees_behaviour_and_not_the_rest() -> None:
    base = train("bpe", vocab_size=300)
    known = fingerprint_tokenizer(base)
    base.chat_template = "{{ 'other' }}"
    base(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(base) == known
    others = [train("bpe", vocab_size=301), train("bpe", vocab_size=300, lowercase=True), train("byte"), train("word")]
    other_eos = train("bpe", vocab_size=300)
    other_eos.eos_token = "<|user|>"
    more = train("bpe", vocab_size=300)
    more.add_tokens([AddedToken("<think>", special=False)])
    prints = [known, *(fingerprint_tokenizer(one) for one in [*others, other_eos, more])]
    assert len(set(prints)) == 7


def test_different_tokenizers_are_named() -> None:
    base = train("word", ["a b"])
    require_same_tokenizer(base, train("word", ["a b"]), "base", "RL model")
    with pytest.raises(ModelError, match=r"base and RL model .* token 27 is 'b' in base and 'c' in RL model"):
        require_same_tokenizer(base, train("word", ["a c"]), "base", "RL model")
    with pytest.raises(
        ModelError, match=r"base has 28 tokens and reference has 29; token 28 is absent in base and 'c'"
    ):
        require_same_tokenizer(base, train("word", ["a b c"]))
    with pytest.raises(ModelError, match="the normalizer differs"):
        require_same_tokenizer(base, train("word", ["a b"], lowercase=True))
    one, other = train("byte"), train("byte")
    state = json.loads(other.backend_tokenizer.to_str())
    state["added_tokens"][3]["lstrip"] = True
    other = PreTrainedTokenizerFast(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)))
    with pytest.raises(ModelError, match="the added tokens differs"):
        require_same_tokenizer(one, other)


def test_the_end_token_of_base_and_reference_may_differ() -> None:
    base, tuned = train("byte"), train("byte")
    tuned.eos_token = "<|user|>"
    require_same_tokenizer(base, tuned)
    assert base.eos_token_id != tuned.eos_token_id
    assert fingerprint_tokenizer(base) != fingerprint_tokenizer(tuned)  # their documents end differently


def test_merges_are_compared() -> None:
    base, other = train("bpe", ["ab cd"] * 3, vocab_size=263), train("bpe", ["ab cd"] * 3, vocab_size=263)
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    other = PreTrainedTokenizerFast(tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)))
    with pytest.raises(ModelError, match="merges differ from merge 0 on"):
        require_same_tokenizer(base, other)


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
@pytest.mark.parametrize("texts", [[], [""], ["", " \n"], ["<|eos|>"]])
def test_no_text_is_an_error(kind: str, texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"no text to train a tokenizer on.*Cure"):
        train_tokenizer(texts, kind=kind, vocab_size=600)  # type: ignore[arg-type]


def test_unusable_texts_are_named() -> None:
    with pytest.raises(DataError, match=r"text 1 .*int"):
        train_tokenizer(["a", 5], kind="bpe", vocab_size=600)  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"text 1 .*surrogate"):
        train_tokenizer(["a", "b\ud83d"], kind="bpe", vocab_size=600)
    with pytest.raises(DataError, match="occurs 5 times"):
        train("word", ["a b c"], min_frequency=5)


@pytest.mark.parametrize(("kind", "smallest"), [("bpe", 261), ("byte", 261), ("word", 27)])
def test_small_vocabularies_are_refused_with_the_smallest_that_works(kind: str, smallest: int) -> None:
    with pytest.raises(UserError, match=f"set vocab_size to {smallest} or more"):
        train(kind, vocab_size=smallest - 1)
    assert len(train(kind, vocab_size=smallest)) == smallest


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="unknown tokenizer kind 'bp'; choose one of bpe, word, byte"):
        train("bp")
    with pytest.raises(UserError, match="min_frequency is 0"):
        train("bpe", min_frequency=0)
    with pytest.raises(UserError, match="unknown chat template 'polmm'"):
        train("bpe", chat_template="polmm")
