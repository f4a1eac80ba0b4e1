"""Conversations to tokens, with an exact mask of the tokens to train on.

The whole conversation is rendered to one string and tokenised once, so the token ids are those the model sees when
it is served. Which tokens are the assistant's is found in characters and then mapped to tokens by their offsets:

* from the `{% generation %}` marks of the template, if it has them;
* otherwise by rendering prefixes: what message i adds to the rendering of the messages before it, the header of the
  turn excepted, is its span. A template that renders earlier turns differently later on (drops their reasoning, say)
  is refused.

A span holds the answer and its end-of-turn token, not the white space after that. A token that lies on both sides of
a boundary is an error, never a guess.

Message text is not trusted. Text that encodes to a control token (`<|im_end|>` written by a user) could end a turn or
forge another speaker's, so it is refused with a DataError; `find_control_tokens` lets a caller count and drop such
conversations. Refused are special tokens in every message, and, in all but the assistant's, also non-special added
tokens that the template itself writes. (An assistant may write `<think>` where that is no special token.)

Suffix legend: T = tokens of the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from polm.errors import DataError, EmptyAnswerError, ModelError, UnmarkableError, UserError
from polm.text.templates import TEMPLATES, TEXT_MARKERS, missing_tokens
from polm.text.tokenizer import require_unicode, unknown_id

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters of the rendered text, [start, end)

ROLES = ("system", "developer", "user", "assistant", "tool")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE = "⟦", "⟧"
_PLAIN: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
_REASONED: tuple[Message, ...] = (_PLAIN[0], {"role": "assistant", "content": "<think>\nb\n</think>\n\nb"})


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A conversation as tokens. token_ids: int64 [T]; assistant_mask: bool [T], True = train on this token.

    message_index: int64 [T], the message whose answer a token to train on belongs to; -1 for all others.
    """

    token_ids: npt.NDArray[np.int64]
    assistant_mask: npt.NDArray[np.bool_]
    text: str
    message_index: npt.NDArray[np.int64]


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    train_on: Literal["all", "last"] = "all",
    template_kwargs: Mapping[str, Any] | None = None,
) -> RenderedChat:
    """Tokenise a conversation and mark the assistant's tokens.

    messages: {"role": one of ROLES, "content": str, ...}. train_on: every assistant turn, or only the last one.
    template_kwargs: further variables of the template (`enable_thinking`, `tools`, ...).

    An assistant's `tool_calls` are trained on like its text, results of tools are not. A template that leaves a call, a
    result or the definition of a tool out is refused.

    token_ids equal `tokenizer(rendered text, add_special_tokens=False)`. If the conversation ends with the assistant,
    `render_prompt(messages[:-1])` is checked to be a prefix of token_ids: what is trained is what is generated.

    Raises DataError for messages that cannot be used (and where no token would be trained on), ModelError for a
    template or tokenizer that does not allow an exact mask: UnmarkableError where it does for a question and a short
    answer, so that it is this conversation which does not go with the template.
    """
    try:
        return _render_marked(tokenizer, messages, train_on, template_kwargs)
    except UnmarkableError as error:
        kwargs = {name: value for name, value in (template_kwargs or {}).items() if name != "tools"}
        if any(_can_mark(tokenizer, probe, kwargs) for probe in (_PLAIN, _REASONED)):
            raise
        raise ModelError(str(error)) from error


def _can_mark(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> bool:
    try:
        _render_marked(tokenizer, messages, "all", kwargs)
    except UserError:
        return False
    return True


def _render_marked(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    train_on: Literal["all", "last"],
    template_kwargs: Mapping[str, Any] | None,
) -> RenderedChat:
    if train_on not in ("all", "last"):
        raise UserError(f"train_on is {train_on!r}; it must be 'all' or 'last'")
    template = _require_template(tokenizer)
    _check_messages(tokenizer, messages)
    tools = (template_kwargs or {}).get("tools") or ()
    _check_tools(tokenizer, tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(
            "the conversation has no assistant message, so there is nothing to train on (roles:"
            f" {', '.join(str(message['role']) for message in messages)}). Cure: drop it, or check the role names"
        )
    wanted = answers if train_on == "all" else answers[-1:]
    render = _renderer(tokenizer, template, template_kwargs)
    marked = _MARKS.search(template) is not None
    text, marks = render(messages, False, marked)
    if marked:
        spans = _spans_of_marks(messages, answers, text, marks)[-len(wanted) :]
    else:
        spans = _spans_by_prefix(tokenizer, messages, wanted, text, render)
    ids_T, starts_T, ends_T = _encode(tokenizer, text)
    without_tools = _renderer(tokenizer, template, {**(template_kwargs or {}), "tools": None})
    _require_tools(messages, tools, text, dict(zip(wanted, spans, strict=True)), without_tools)
    messages_T = np.full(len(ids_T), -1, dtype=np.int64)
    for index, span in zip(wanted, spans, strict=True):
        inside_T = _tokens_inside(text, span, ids_T, starts_T, ends_T, index)
        _require_end_of_turn(tokenizer, ids_T, inside_T, index)
        messages_T[inside_T] = index
    mask_T = messages_T >= 0
    if not mask_T.any():
        raise EmptyAnswerError(
            f"none of the {len(ids_T)} tokens of the conversation is the assistant's, so there is nothing to train on:"
            " its messages are empty and the template writes no end-of-turn token. Cure: drop the conversation"
        )
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        prompt, _ = render(messages[:-1], True, False)
        _require_prompt_prefix(tokenizer, prompt, text, ids_T, starts_T, ends_T)
    return RenderedChat(ids_T, mask_T, text, messages_T)


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> npt.NDArray[np.int64]:
    """Token ids [T] of the conversation so far and the header of the assistant's next turn.

    Raises as `render_chat` does, and DataError if the assistant spoke last.
    """
    template = _require_template(tokenizer)
    _check_messages(tokenizer, messages)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "a prompt cannot end with an assistant message: there is no turn left to generate."
            " Cure: pass the messages before it"
        )
    text, _ = _renderer(tokenizer, template, template_kwargs)(messages, True, False)
    return _encode(tokenizer, text)[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens at which generation of an answer stops: the template's end-of-turn token, then eos if it differs."""
    probe = render_chat(tokenizer, _PLAIN)
    last = int(probe.token_ids[np.flatnonzero(probe.assistant_mask)[-1]])
    stops = [last] if last in _facts(tokenizer).special_ids else []
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(int(tokenizer.eos_token_id))
    return tuple(stops)


def show_supervision(
    tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int] | npt.NDArray[np.int64], mask: Sequence[bool] | Any
) -> str:
    """The text of the tokens with each run of trained tokens in ⟦ ⟧ (brackets of the text itself become [[ ]]).

    token_ids: [T]; mask: [T], nonzero = trained. Raises DataError if the lengths differ.
    """
    ids_T, mask_T = np.asarray(token_ids), np.asarray(mask).astype(np.bool_)
    if ids_T.shape != mask_T.shape or ids_T.ndim != 1:
        raise DataError(
            f"cannot show supervision: token ids of shape {ids_T.shape} and a mask of shape {mask_T.shape};"
            " both must be one-dimensional and equally long"
        )
    edges = np.flatnonzero(np.diff(mask_T)) + 1
    shown = []
    for run in np.split(np.arange(len(ids_T)), edges):
        if len(run):
            text = tokenizer.decode(ids_T[run].tolist(), skip_special_tokens=False)
            text = text.replace(_OPEN, "[[").replace(_CLOSE, "]]")
            shown.append(f"{_OPEN}{text}{_CLOSE}" if mask_T[run[0]] else text)
    return "".join(shown)


def find_control_tokens(tokenizer: PreTrainedTokenizerFast, text: str, *, role: str = "user") -> list[str]:
    """Control tokens and role markers of the chat template that `text` would put into a message of this role.

    An empty list means that the text is safe. Unknown words do not count.
    """
    facts = _facts(tokenizer)
    found: list[str] = []
    if facts.may_hold(text):
        refused = facts.special_ids if role == "assistant" else facts.special_ids | facts.template_ids
        ids = facts.encoder.encode(text, add_special_tokens=False).ids
        found = [facts.added_texts[token] for token in ids if token in refused]
    return list(dict.fromkeys([*found, *(marker for marker in facts.text_markers if marker in text)]))


# --- what is known about a tokenizer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """Derived from a tokenizer once; `stamp` tells when it has changed since."""

    stamp: tuple[int, str | None]
    encoder: Tokenizer  # as the tokenizer's own, but with offsets that cover leading spaces
    special_ids: frozenset[int]
    added_texts: dict[int, str]
    is_added_V: npt.NDArray[np.bool_]
    template_ids: frozenset[int]  # added tokens that stand in the template's source
    text_markers: tuple[str, ...]
    written: re.Pattern[str] | None  # the tokens that may be refused, where a text without them cannot encode to them

    def may_hold(self, text: str) -> bool:
        """False if no token of `text` can be one of those that are refused; far cheaper than to encode it."""
        return self.written is None or not text.isascii() or self.written.search(text) is not None


_FACTS: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def _facts(tokenizer: PreTrainedTokenizerFast) -> _Facts:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be traced back to characters."
            " Cure: load the fast version (a folder with tokenizer.json)"
        )
    template = _template_of(tokenizer)
    stamp = (len(tokenizer), template)
    known = _FACTS.get(tokenizer)
    if known is not None and known.stamp == stamp:
        return known
    added = dict(tokenizer.added_tokens_decoder)
    unknown = unknown_id(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Post-processors trim spaces off the offsets and may add tokens; padding and truncation are left over from calls.
    encoder = Tokenizer.from_str(json.dumps({**state, "post_processor": None, "padding": None, "truncation": None}))
    special_ids = frozenset(index for index, token in added.items() if token.special and index != unknown)
    # Some vocabularies hold runs of white space as added tokens; those are no role markers.
    template_ids = frozenset(i for i, t in added.items() if template and t.content.strip() and t.content in template)
    is_added_V = np.zeros(max([len(tokenizer), *(index + 1 for index in added)]), dtype=np.bool_)
    is_added_V[list(added)] = True
    facts = _Facts(
        stamp=stamp,
        encoder=encoder,
        special_ids=special_ids,
        added_texts={index: token.content for index, token in added.items()},
        is_added_V=is_added_V,
        template_ids=template_ids,
        text_markers=next((TEXT_MARKERS.get(name, ()) for name in TEMPLATES if TEMPLATES[name] == template), ()),
        written=_build_pattern(state, [added[index].content for index in special_ids | template_ids]),
    )
    _FACTS[tokenizer] = facts
    return facts


def _build_pattern(state: Mapping[str, Any], contents: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the added tokens in ASCII text; None where a text that does not hold their letters might become one.

    That needs a BPE whose pieces are parts of the text (pre-tokenisers split it, and write other characters for spaces
    and bytes only), a normaliser that leaves ASCII as it is, and tokens of printable ASCII.
    """
    model, normaliser = state["model"], state.get("normalizer") or {"type": "NFC"}
    parts_only = model["type"] == "BPE" and not any(
        model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    leaves_ascii = normaliser["type"] in ("NFC", "NFD", "NFKC", "NFKD")
    if not contents or not parts_only or not leaves_ascii or not all(re.fullmatch("[!-~]+", c) for c in contents):
        return None
    return re.compile("|".join(map(re.escape, contents)))


def _template_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _require_template(tokenizer: PreTrainedTokenizerFast) -> str:
    template = _template_of(tokenizer)
    if template is None:
        fitting = [name for name in TEMPLATES if not missing_tokens(tokenizer, name)]
        raise ModelError(
            "this tokenizer has no chat template. Cure: set one with apply_template(tokenizer, name); there are"
            f" {', '.join(TEMPLATES)}; this vocabulary has the tokens for {', '.join(fitting) or 'none of them'}"
        )
    return template


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids [T], and the characters [start, end) that each covers, [T] and [T]."""
    encoding = _facts(tokenizer).encoder.encode(text, add_special_tokens=False)
    offsets_T2 = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
    return np.array(encoding.ids, dtype=np.int64), offsets_T2[:, 0], offsets_T2[:, 1]


# --- messages and rendering -----------------------------------------------------------------------------------------


def _check_messages(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("the conversation is empty; expected a list of {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError(
                f"message {index} is {_excerpt(repr(message))}; expected an object with 'role' and a string 'content'"
                " (an empty string where there is no text)"
            )
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"message {index} has the role {role!r}; expected one of {', '.join(ROLES)}")
        for text in _strings(message):
            require_unicode(text, f"message {index} ({role})")
            found = find_control_tokens(tokenizer, text, role=role)
            if found:
                raise DataError(
                    f"message {index} ({role}) contains {', '.join(map(repr, found))}, which the chat template uses or"
                    " the tokenizer reads as a control token; it could end the turn or forge another speaker's."
                    f" Text: {_excerpt(text, around=found[0])!r}. Cure: drop the conversation"
                    " (find_control_tokens tells which), or rewrite the marker in the text"
                )


def _check_tools(tokenizer: PreTrainedTokenizerFast, tools: Sequence[Mapping[str, Any]]) -> None:
    for index, tool in enumerate(tools):
        for text in _strings(tool):
            if found := find_control_tokens(tokenizer, text, role="system"):
                raise DataError(
                    f"tool {index} contains {', '.join(map(repr, found))}, which the chat template uses or the "
                    "tokenizer reads as a control token. Cure: drop the conversation, or rewrite the marker in the text"
                )


def _strings(value: Any) -> list[str]:
    """Every string in a message, at any depth."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


_Render = Callable[[Sequence[Message], bool, bool], tuple[str, list[Span]]]


def _renderer(tokenizer: PreTrainedTokenizerFast, template: str, template_kwargs: Mapping[str, Any] | None) -> _Render:
    """A function (messages, add_generation_prompt, with_marks) -> (text, spans of the generation marks)."""
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, **(template_kwargs or {})}

    def render(messages: Sequence[Message], prompt: bool, marks: bool) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **variables,
            )
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: {error}. Cure: repair or replace it") from error
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"the chat template refuses the conversation (roles: {roles}): {error}. Cure: repair the conversation"
                " or set another template"
            ) from error
        return texts[0], spans[0] if marks else []

    return render


# --- spans ----------------------------------------------------------------------------------------------------------


def _spans_of_marks(messages: Sequence[Message], answers: list[int], text: str, marks: list[Span]) -> list[Span]:
    if len(marks) != len(answers):
        raise UnmarkableError(
            f"the chat template marks {len(marks)} generations, but the conversation has {len(answers)} assistant"
            " messages. Cure: a template with one {% generation %} block around each assistant turn"
        )
    for index, (start, end) in zip(answers, marks, strict=True):
        tail = messages[index]["content"].strip()[-32:]
        # transformers counts wrongly where a mark stands in a macro or a {% set %} block; trust only what fits.
        if tail not in text[start:end]:
            raise UnmarkableError(
                f"the generation mark of message {index} covers {_excerpt(text[start:end])!r}, which does not hold the"
                f" end of its content {_excerpt(tail)!r}. Cure: put {{% generation %}} around the content of assistant"
                " turns, outside macros and {% set %} blocks"
            )
    return marks


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], wanted: list[int], text: str, render: _Render
) -> list[Span]:
    facts = _facts(tokenizer)
    special_texts = tuple(facts.added_texts[index] for index in facts.special_ids)
    spans = []
    for index in wanted:
        if index == 0:
            raise UnmarkableError(
                "the conversation starts with an assistant message and the chat template has no generation marks, so"
                " the header of its turn cannot be told from its text. Cure: a template with {% generation %} marks"
            )
        before, _ = render(messages[:index], True, False)
        after, _ = render(messages[: index + 1], False, False)
        if not after.startswith(before) or not text.startswith(after):
            shorter, longer = (before, after) if not after.startswith(before) else (after, text)
            raise UnmarkableError(
                f"the chat template is not prefix-preserving: message {index} (assistant) is rendered differently"
                f" {'once its answer is there' if shorter is before else 'once later messages follow'}"
                f" ({_first_mismatch(shorter, longer)}), so its tokens cannot be found exactly. Cure: a template with"
                " {% generation %} marks, for instance apply_template(tokenizer, name) with one of"
                f" {', '.join(TEMPLATES)}, or train_on='last' with one conversation per answer"
            )
        end = len(after)
        trimmed = after.rstrip()
        if len(trimmed) > len(before) and trimmed.endswith(special_texts):
            end = len(trimmed)
        spans.append((len(before), end))
    return spans


def _require_tools(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    spans: Mapping[int, Span],
    without_tools: _Render,
) -> None:
    """Refuse a template that drops what the data says about tools: most templates do so without a word."""
    lost = []
    for index, message in enumerate(messages):
        start, end = spans.get(index, (0, len(text)))
        for call in message.get("tool_calls") or ():
            if str(call["function"]["name"]) not in text[start:end]:
                lost.append(f"the call of {call['function']['name']!r} in message {index}")
        if message["role"] == "tool" and message["content"].strip()[-32:] not in text:
            lost.append(f"the result of a tool in message {index}")
    if tools and without_tools(messages, False, False)[0] == text:
        lost += [f"the definition of the tool {tool['function']['name']!r}" for tool in tools]
    if lost:
        raise ModelError(
            f"the chat template leaves out {lost[0]}{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}: it does "
            "not support tools. Cure: a model whose own template has `tools` and `tool_calls`, or leave such "
            "conversations out"
        )


def _tokens_inside(
    text: str,
    span: Span,
    ids_T: npt.NDArray[np.int64],
    starts_T: npt.NDArray[np.int64],
    ends_T: npt.NDArray[np.int64],
    index: int,
) -> npt.NDArray[np.bool_]:
    """Which tokens cover characters of the span [T]; UnmarkableError if one covers characters outside of it too."""
    start, end = span
    overlaps_T = (starts_T < end) & (ends_T > start)
    straddling = np.flatnonzero(overlaps_T & ((starts_T < start) | (ends_T > end)))
    if len(straddling):
        first = int(straddling[0])
        edge = start if starts_T[first] < start else end
        token = text[int(starts_T[first]) : int(ends_T[first])]
        raise UnmarkableError(
            f"token {first} (id {int(ids_T[first])}, {token!r}) lies on both sides of the"
            f" {'start' if edge == start else 'end'} of message {index} (assistant), at"
            f" {text[max(0, edge - 20) : edge]!r} | {text[edge : edge + 20]!r}, so it can be neither trained on nor"
            " left out. Cure: strip white space from the ends of the message, or set a template whose role markers"
            " are special tokens"
        )
    return np.asarray(overlaps_T, dtype=np.bool_)


def _require_end_of_turn(
    tokenizer: PreTrainedTokenizerFast, ids_T: npt.NDArray[np.int64], inside_T: npt.NDArray[np.bool_], index: int
) -> None:
    """Refuse marks that stop just before the eos token: the model would never learn to stop."""
    where = np.flatnonzero(inside_T)
    if not len(where) or where[-1] + 1 == len(ids_T) or int(ids_T[where[-1]]) in _facts(tokenizer).special_ids:
        return
    if ids_T[where[-1] + 1] == tokenizer.eos_token_id:
        raise ModelError(
            f"the chat template leaves the end-of-turn token {tokenizer.eos_token!r} after message {index}"
            " (assistant) out of the generation marks, so a model trained with it would never stop."
            " Cure: move {% endgeneration %} behind that token"
        )


def _require_prompt_prefix(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    text: str,
    ids_T: npt.NDArray[np.int64],
    starts_T: npt.NDArray[np.int64],
    ends_T: npt.NDArray[np.int64],
) -> None:
    if not text.startswith(prompt):
        raise UnmarkableError(
            "the prompt of the last answer is not the beginning of the conversation as the chat template renders it"
            f" ({_first_mismatch(prompt, text)}): the model would be trained on other text than it is prompted with."
            " Cure: give the answer in the form the template expects (reasoning models may want <think> first), pass"
            " template_kwargs that switch this off, or set another template"
        )
    if _ends_alike(tokenizer, prompt, text, ids_T, starts_T, ends_T):
        return
    prompt_ids, _, prompt_ends = _encode(tokenizer, prompt)
    if not np.array_equal(prompt_ids, ids_T[: len(prompt_ids)]):
        num_common = min(len(prompt_ids), len(ids_T))
        same = prompt_ids[:num_common] == ids_T[:num_common]
        first = int(np.argmin(same)) if not same.all() else num_common - 1
        tokens = tokenizer.convert_ids_to_tokens([int(prompt_ids[first]), int(ids_T[first])])
        at = int(prompt_ends[first])
        raise UnmarkableError(
            f"the tokens of the prompt are not the first tokens of the conversation: token {first} is {tokens[0]!r} in"
            f" the prompt and {tokens[1]!r} in the conversation, near {text[max(0, at - 20) : at + 20]!r}. Cure: strip"
            " white space from the start of the last answer, or set a template whose role markers are special tokens"
        )


def _ends_alike(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    text: str,
    ids_T: npt.NDArray[np.int64],
    starts_T: npt.NDArray[np.int64],
    ends_T: npt.NDArray[np.int64],
) -> bool:
    """Whether the tokens of the prompt are seen to be the first ones of `text`, from its last added token alone.

    A tokenizer cuts a text at its added tokens first, and what stands between them cannot change each other. So what
    is before the last added token of the prompt is encoded as it is in `text`, and only the rest is encoded again.
    """
    facts = _facts(tokenizer)
    places = np.flatnonzero(facts.is_added_V[ids_T] & (ends_T <= len(prompt)))
    if not len(places):
        return False
    last = int(places[-1])
    start = int(starts_T[last])
    if text[start : int(ends_T[last])] != facts.added_texts[int(ids_T[last])]:
        return False  # it came out of a normaliser, or took spaces beside it
    tail = facts.encoder.encode(prompt[start:], add_special_tokens=False).ids
    return bool(np.array_equal(tail, ids_T[last : last + len(tail)]))


def _first_mismatch(shorter: str, longer: str) -> str:
    at = next((i for i, (one, other) in enumerate(zip(shorter, longer, strict=False)) if one != other), len(longer))
    return f"at character {at}: {shorter[at : at + 40]!r} became {longer[at : at + 40]!r}"


def _excerpt(text: str, around: str = "", length: int = 80) -> str:
    at = max(0, text.find(around) - length // 2) if around else 0
    return ("..." if at else "") + text[at : at + length] + ("..." if at + length < len(text) else "")
