"""What is taken out of a user's data: exact duplicates, and records that hold a question of a benchmark."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from polm.data.records import Conversation, Feedback, Record, Stepwise, list_texts

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each character counts as a word
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_TOKENS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")

Names = frozenset[str]


def fingerprint_record(record: Record) -> bytes:
    """Sixteen bytes that are equal for records of the same kind, texts, labels and tools.

    Texts are compared in Unicode's NFC with every run of white space as one space; case counts. Weights do not.
    """
    texts = [" ".join(unicodedata.normalize("NFC", text).split()) for text in list_texts(record)]
    labels = repr(getattr(record, "label", None)) if isinstance(record, Feedback) else ""
    labels += repr(record.labels) if isinstance(record, Stepwise) else ""
    labels += json.dumps(record.tools, sort_keys=True) if isinstance(record, Conversation) and record.tools else ""
    content = "\x1e".join([type(record).__name__, labels, *texts])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Contamination:
    """Finds questions of benchmarks in records.

    A question of at least `ngram` words is found by any `ngram` words of it in a row, whatever stands between them but
    letters and digits; a shorter one only as a whole, signs included. Case does not count.
    """

    def __init__(self, questions: Mapping[str, Iterable[str]], ngram: int = 13):
        if ngram < 2:
            raise ValueError("an n-gram has at least two words")
        self.ngram = ngram
        grams: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        short: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        for name, texts in questions.items():
            for text in texts:
                words = split_words(text)
                for first in range(len(words) - ngram + 1):
                    grams[tuple(words[first : first + ngram])].add(name)
                if len(words) < ngram and (tokens := split_tokens(text)):
                    short[tuple(tokens)].add(name)
        self.grams: dict[tuple[str, ...], Names] = {gram: frozenset(names) for gram, names in grams.items()}
        # Few places of a text begin like a question, so the rest is not looked up.
        self.pairs = {gram[:2] for gram in self.grams}
        self.short: dict[str, list[tuple[tuple[str, ...], Names]]] = {}
        for whole, found in short.items():
            self.short.setdefault(whole[0], []).append((whole, frozenset(found)))

    def find(self, record: Record) -> set[str]:
        """The benchmarks of which the record holds a question."""
        found: set[str] = set()
        for text in list_texts(record):
            words = split_words(text)
            for first, pair in enumerate(pairwise(words)):
                if pair in self.pairs:
                    found |= self.grams.get(tuple(words[first : first + self.ngram]), frozenset())
            if self.short:
                found |= self._find_short(split_tokens(text))
        return found

    def _find_short(self, tokens: list[str]) -> set[str]:
        found: set[str] = set()
        for first, token in enumerate(tokens):
            for whole, names in self.short.get(token, ()):
                if tuple(tokens[first : first + len(whole)]) == whole:
                    found |= names
        return found


def split_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; Chinese, Japanese and Korean by the character."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def split_tokens(text: str) -> list[str]:
    """The words and, one by one, the signs between them."""
    return _TOKENS.findall(unicodedata.normalize("NFKC", text).casefold())
