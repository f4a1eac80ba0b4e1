"""What a judge reads and how its verdict is read. Texts to be judged are data: they cannot pose as the frame.

The frame is the template around the texts: its tags (`<answer_a>`) and its verdict marks (`[[A]]`). Both are broken
wherever a text holds them. That keeps an answer from ending its own quotation, from opening another, and from leaving a
verdict that the judge only has to quote. It does not keep a judge from being persuaded: judging both orders shows that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from polm.recipe_judge import PLACEHOLDER

# Characters without a shape, with which a mark could be spelt so that it looks the same.
_SHAPELESS = "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]*"
_TAG = re.compile(r"</?\s*([A-Za-z_][\w-]*)")
_VERDICT = re.compile(r"\[\[([^\[\]]*)\]\]")
_WHOLE = re.compile(r"\s*([0-9]{1,3})\s*\Z")
TURN_TAG = "turn"
PREFERENCES = {"A": 1.0, "B": 0.0, "C": 0.5}


def find_tags(template: str) -> frozenset[str]:
    """Names of the tags that a template writes, and the one of turns."""
    return frozenset({TURN_TAG, *(name.lower() for name in _TAG.findall(PLACEHOLDER.sub("", template)))})


def neutralise(text: str, tags: frozenset[str]) -> str:
    """`text` with each tag's `<` as `‹` and each `[[` as `[ [`: it can neither end its quotation nor hold a verdict.

    Case, white space and shapeless characters inside a tag do not hide it. Everything else stays as it is, but for
    lone surrogates, which no file can hold.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    gap = _SHAPELESS.replace("[", r"[\s", 1) + "+"  # possessive: a long gap must not be tried at every split
    names = "|".join(_SHAPELESS.join(map(re.escape, name)) for name in sorted(tags, key=len, reverse=True))
    text = re.sub(rf"<(?={gap}/?{gap}(?:{names})(?![A-Za-z0-9_-]))", "\u2039", text, flags=re.IGNORECASE)
    return re.sub(rf"\[(?={gap}\[)", "[ ", text)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its places filled, in one pass: a place named inside a text stays text."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def show_conversation(messages: Sequence[Mapping[str, Any]], tags: frozenset[str]) -> str:
    """The conversation so far: a single user message as it is, anything else as tagged turns."""
    if len(messages) == 1 and messages[0].get("role") == "user":
        return neutralise(str(messages[0].get("content") or ""), tags)
    turns = []
    for message in messages:
        role = re.sub(r"[^a-z]", "", str(message.get("role", "")).lower())
        text = neutralise(str(message.get("content") or ""), tags)
        turns.append(f'<{TURN_TAG} role="{role}">\n{text}\n</{TURN_TAG}>')
    return "\n".join(turns)


def build_question(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    texts: Mapping[str, str],
    *,
    criterion: str,
    scale: tuple[int, int],
) -> str:
    """A judge's prompt. `texts` are the answers by the names of their places; `criterion` is the user's own words."""
    tags = find_tags(template)
    shown = {name: neutralise(text, tags) for name, text in texts.items()}
    frame = {"criterion": criterion, "low": str(scale[0]), "high": str(scale[1])}
    return fill(template, {**frame, **shown, "question": show_conversation(messages, tags)})


def read_mark(text: str) -> str | None:
    """What stands in the double brackets of a reply; None without any, or where several differ."""
    found = {mark.strip() for mark in _VERDICT.findall(text)}
    return found.pop() if len(found) == 1 else None


def read_preference(text: str) -> float | None:
    """1 for [[A]], 0 for [[B]], 0.5 for [[C]]; None for everything else."""
    return PREFERENCES.get(read_mark(text) or "")


def read_grade(text: str, scale: tuple[int, int]) -> int | None:
    """The whole number in double brackets; None where there is none, or it lies outside of the scale."""
    match = _WHOLE.match(read_mark(text) or "")
    grade = int(match[1]) if match else None
    return grade if grade is not None and scale[0] <= grade <= scale[1] else None
