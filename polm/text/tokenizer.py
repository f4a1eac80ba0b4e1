"""Training small tokenizers, and telling whether two tokenizers are the same.

Three kinds, all made of standard `tokenizers` parts only, so that they save and load without any code of ours:

* ``bpe``: byte-level BPE, each digit its own token, no unknown token; any text comes back exactly.
* ``byte``: the 256 bytes; any text comes back exactly.
* ``word``: one token per word, digit or punctuation mark, and an unknown token.

How the ``word`` kind keeps white space apart from glue. White space is not a token: decoding puts one space between
two pieces. Where two pieces touch, one of them carries the joiner `￭` (U+FFED), and decoding closes the gap:

    "x = 47, (a+b)"  ->  x  =  4  ￭7  ￭,  (￭  a  ￭+￭  b  ￭)

* A word is a letter or underscore followed by letters, digits and underscores, so `N0` and `x7` are one token each
  and `x 7` is two. Words are never marked, except right after a digit (`7x` -> `7 ￭x`).
* The first digit of a number is bare and each further one is marked, so `47` and `4 7` stay different.
* A punctuation mark carries the joiner on the side or sides where it touches something. Runs of one and the same
  `#`, `.`, `=` or `*` are one token (`####`). Characters of scripts written without spaces (Chinese, Japanese, Thai)
  are treated like punctuation: one token each.

So for every text without unknown words and special tokens, decode(encode(text)) == normalise_words(text): the text
with each run of white space made one space and none at the ends. A special token is set off by single spaces.
Offsets of a marked piece reach back to the last character of the piece before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from polm.errors import DataError, ModelError, UserError
from polm.text.templates import BOS_TOKENS, CONTROL_TOKENS, apply_template, require_template_name

PAD, EOS, USER, ASSISTANT, SYSTEM, UNK = "<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"
JOINER = "\uffed"
KINDS = ("bpe", "word", "byte")

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"  # scripts without spaces between words
_WORD = rf"[\w&&[^{_UNSPACED}]]"  # a character that may stand in a word
_PUNCT = rf"[[^\w\s{JOINER}]{_UNSPACED}]"
_SAME_RUN = "|".join(rf"(?<={re.escape(c)}){re.escape(c)}" for c in "#.=*")
# (where to insert, what); each pattern is empty, so nothing is replaced. In this order.
_JOINTS = (
    # After a digit of a number, not of a word. Looking back at most 24 digits keeps the time linear in the text; past
    # that everything counts as a number.
    (rf"(?<=(?:\A|[^\w]|[{_UNSPACED}])\d{{1,24}}|\d{{25}})(?={_WORD})", f" {JOINER}"),
    (rf"(?<=\S)(?={_PUNCT})(?!{_SAME_RUN})", f" {JOINER}"),
    (rf"(?<={_PUNCT})(?={_WORD})", f"{JOINER} "),
)

# What BPE merges within. Line breaks stay together whatever follows them, so that a prompt that ends with some is cut
# into the same tokens as when an answer follows.
_BPE_WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Literal["bpe", "word", "byte"],
    vocab_size: int,
    min_frequency: int = 1,
    chat_template: str = "polm",
    lowercase: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; the same texts in the same order give the same tokenizer.

    texts: documents; read once, so a generator will do. Special tokens written in them are skipped, not learned.
    vocab_size: the most entries, special tokens included. Fewer come out if the texts do not hold more (bpe, word);
        `byte` always has the 256 bytes and the special tokens.
    min_frequency: how often a word (word) or a pair (bpe) must occur to get an entry.
    chat_template: a name in polm.text.templates.TEMPLATES; its control tokens join the special tokens.
    lowercase: fold case first; then only the lower-cased text comes back.

    The special tokens come first: <|pad|> 0, <|eos|> 1, <|user|> 2, <|assistant|> 3, <|system|> 4, then <|unk|> for
    `word`, then what the template needs. Raises UserError for settings that cannot work, DataError for texts that
    hold nothing to learn from.
    """
    _require_settings(kind, vocab_size, min_frequency, chat_template)
    specials = _special_tokens(kind, chat_template)
    documents = _checked_texts(texts, specials)
    if kind == "word":
        backend = _train_word(documents, specials, vocab_size, min_frequency, lowercase)
    else:
        backend = _train_bytes(documents, specials, vocab_size, min_frequency, lowercase, merge=kind == "bpe")
    roles = {"unk_token": UNK} if kind == "word" else {}
    if chat_template in BOS_TOKENS:
        roles["bos_token"] = BOS_TOKENS[chat_template]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[token for token in specials if token not in {PAD, EOS, *roles.values()}],
        clean_up_tokenization_spaces=False,
        **roles,
    )
    apply_template(tokenizer, chat_template)
    return tokenizer


def normalise_words(text: str) -> str:
    """The form in which a `word` tokenizer gives `text` back: single spaces, no joiner characters."""
    return " ".join(text.replace(JOINER, " ").split())


def count_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """How many tokens of `text` are the unknown token; 0 for tokenizers that can spell every text."""
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return 0
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids.count(unknown)


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that stands for what the tokenizer cannot spell; None if it can spell everything.

    Some tokenizers name an unknown token that their model never produces (GPT-2 names its end-of-text token).
    """
    model = tokenizer.backend_tokenizer.model
    can_fail = isinstance(model, models.Unigram) or getattr(model, "unk_token", None) is not None
    if not can_fail or tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    return int(tokenizer.unk_token_id)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of everything that turns text into token ids and back; the chat template does not count.

    Vocabulary, merges, normaliser, pre-tokeniser, decoder, post-processor, added tokens, and which tokens begin and
    end a sequence or stand for the unknown. Padding, truncation and names of files do not count.
    """
    state = _state(tokenizer)
    state["roles"] = {role: _role(tokenizer, role) for role in ("bos_token", "eos_token", "unk_token")}
    state["post_processor"] = _backend_json(tokenizer)["post_processor"]
    canonical = json.dumps(state, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def require_same_tokenizer(
    a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast, name_a: str = "base", name_b: str = "reference"
) -> None:
    """Raise ModelError, naming the first difference, unless both turn every text into the same token ids.

    Which token ends a sequence may differ: an instruction-tuned model usually stops at another token than its base,
    and the ids still mean the same.
    """
    difference = _first_difference(a, b, name_a, name_b)
    if difference is not None:
        raise ModelError(
            f"{name_a} and {name_b} do not have the same tokenizer: {difference}. Per-token scores of one cannot be"
            f" laid over tokens of the other. Cure: take a {name_b} that was trained from the same base model, or"
            " tokenise and train both with one tokenizer"
        )


# --- settings and texts ---------------------------------------------------------------------------------------------


def _require_settings(kind: str, vocab_size: int, min_frequency: int, chat_template: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer kind {kind!r}; choose one of {', '.join(KINDS)}")
    if min_frequency < 1:
        raise UserError(f"min_frequency is {min_frequency}; it must be 1 or more")
    require_template_name(chat_template)
    num_specials = len(_special_tokens(kind, chat_template))
    num_alphabet = 2 * 10 + 1 if kind == "word" else 256
    if vocab_size < num_specials + num_alphabet:
        alphabet = "10 digits in two forms and a word" if kind == "word" else "256 bytes"
        raise UserError(
            f"vocab_size is {vocab_size}, but a {kind!r} tokenizer with the chat template {chat_template!r} needs"
            f" {num_specials} special tokens and {num_alphabet} entries for {alphabet}."
            f" Cure: set vocab_size to {num_specials + num_alphabet} or more"
        )


def _special_tokens(kind: str, chat_template: str) -> list[str]:
    tokens = [PAD, EOS, USER, ASSISTANT, SYSTEM]
    if kind == "word":
        tokens.append(UNK)
    if chat_template in BOS_TOKENS:
        tokens.append(BOS_TOKENS[chat_template])
    return list(dict.fromkeys([*tokens, *CONTROL_TOKENS[chat_template]]))


def _checked_texts(texts: Iterable[str], specials: list[str]) -> Iterator[str]:
    """The texts cut at special tokens, with a first one that is not blank; DataError where there is none."""
    special = re.compile("|".join(map(re.escape, specials)))

    def pieces() -> Iterator[str]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {index} to train a tokenizer on is a {type(text).__name__}, expected a string")
            require_unicode(text, f"text {index} to train a tokenizer on")
            yield from (piece for piece in special.split(text) if piece.strip())

    stream = pieces()
    first = next(stream, None)
    if first is None:
        raise DataError(
            "there is no text to train a tokenizer on: every document is empty or holds only white space and special"
            " tokens. Cure: check the data files and the names of their text field"
        )
    return chain([first], stream)


def require_unicode(text: str, what: str) -> None:
    """Raise DataError if `text` holds half of a surrogate pair, which no UTF-8 file and no tokenizer can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {text[error.start]!r} at character {error.start}: half of a surrogate pair, not a character."
            " Cure: repair the file (a JSON escape such as \\ud83d needs its second half) or drop this item"
        ) from error


# --- the three kinds ------------------------------------------------------------------------------------------------


def _train_bytes(
    texts: Iterator[str], specials: list[str], vocab_size: int, min_frequency: int, lowercase: bool, *, merge: bool
) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = len(specials)
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(_BPE_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level]) if merge else byte_level
    backend.decoder = decoders.ByteLevel()
    # Untrimmed offsets: a token covers its leading space, so that spans of characters map to tokens exactly.
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if merge:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=_as_added(specials),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(_as_added(specials))
    assert backend.token_to_id(alphabet[0]) == first
    return backend


def _train_word(
    texts: Iterator[str], specials: list[str], vocab_size: int, min_frequency: int, lowercase: bool
) -> Tokenizer:
    normalizer = _word_normalizer(lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text).split())
    digits = [form for digit in "0123456789" for form in (digit, JOINER + digit)]
    counted = [piece for piece, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    frequent = [piece for piece in counted if counts[piece] >= min_frequency]
    # With room to spare, a mark seen as "(￭ 4" is also known as "x ￭(￭ 4": one spelling must not make it unknown.
    forms = [form for piece in frequent if _is_punctuation(piece) for form in _glue_forms(piece.strip(JOINER))]
    entries = list(dict.fromkeys([*specials, *digits, *frequent, *forms]))[:vocab_size]
    if not any(piece in counts for piece in entries[len(specials) :]):
        raise DataError(
            f"no word of the texts to train a tokenizer on occurs {min_frequency} times (min_frequency)."
            " Cure: lower min_frequency or give more text"
        )
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(entries)}, unk_token=UNK))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"\A"), " "),
            decoders.Fuse(),
            decoders.Replace(f" {JOINER}", ""),
            decoders.Replace(f"{JOINER} ", ""),
            decoders.Replace(JOINER, ""),  # a joiner with nothing to join, as a model may write at an end
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(_as_added(specials))
    return backend


def _word_normalizer(lowercase: bool) -> Any:
    steps: list[Any] = [normalizers.Replace(JOINER, " ")]
    if lowercase:
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(pattern), joint) for pattern, joint in _JOINTS]
    return normalizers.Sequence(steps)


def _is_punctuation(piece: str) -> bool:
    bare = piece.strip(JOINER)
    return bool(bare) and not (bare[0].isalnum() or bare[0] == "_")


def _glue_forms(bare: str) -> list[str]:
    return [bare, JOINER + bare, bare + JOINER, JOINER + bare + JOINER]


def _as_added(specials: list[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in specials]


# --- sameness -------------------------------------------------------------------------------------------------------


def _backend_json(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (it has no tokenizer.json to compare or to map"
            " characters to tokens). Cure: convert it, or load it with AutoTokenizer where a fast version exists"
        )
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What decides text -> ids and ids -> text, as plain data."""
    backend = _backend_json(tokenizer)
    return {part: backend[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")}


def _role(tokenizer: PreTrainedTokenizerFast, role: str) -> str | None:
    token = getattr(tokenizer, role, None)
    return None if token is None else str(token)


def _first_difference(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast, name_a: str, name_b: str) -> str | None:
    state_a, state_b = _state(a), _state(b)
    if state_a == state_b:
        return None
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    if vocab_a != vocab_b:
        if len(vocab_a) != len(vocab_b):
            size = f"{name_a} has {len(vocab_a)} tokens and {name_b} has {len(vocab_b)}; "
        else:
            size = f"both have {len(vocab_a)} tokens, but "
        by_id_a = {index: token for token, index in vocab_a.items()}
        by_id_b = {index: token for token, index in vocab_b.items()}
        first = min(i for i in by_id_a.keys() | by_id_b.keys() if by_id_a.get(i) != by_id_b.get(i))
        one, other = _shown(by_id_a.get(first)), _shown(by_id_b.get(first))
        return f"{size}token {first} is {one} in {name_a} and {other} in {name_b}"
    merges_a, merges_b = state_a["model"].get("merges"), state_b["model"].get("merges")
    if merges_a != merges_b:
        pairs = list(zip(merges_a or [], merges_b or [], strict=False))
        first = next((i for i, (left, right) in enumerate(pairs) if left != right), len(pairs))
        return f"the vocabularies are equal, but the BPE merges differ from merge {first} on"
    parts = [part for part in state_a if state_a[part] != state_b[part]]
    return f"the vocabularies are equal, but the {parts[0].replace('_', ' ')} differs"


def _shown(token: str | None) -> str:
    return "absent" if token is None else repr(token)
