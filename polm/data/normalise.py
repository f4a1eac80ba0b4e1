"""From a row of a user's file to a canonical record: one pure function a format, (place, row) -> record.

`place` is "file:line" and stands in every error. A column that is null is absent. Where a list is expected, a string
that holds it as JSON does as well, as CSV cells cannot hold lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from polm.data.files import Cell, join_names, name_type, parse_json
from polm.data.messages import (
    build_message,
    build_messages,
    build_tools,
    parse_messages,
    prepare_row,
    read_media,
    split_transcript,
)
from polm.data.records import (
    PROMPT_COLUMNS,
    Conversation,
    Document,
    Feedback,
    Message,
    Preference,
    Prompt,
    Row,
    Stepwise,
)
from polm.errors import DataError, PromptsDifferError

PREFERENCE_FORMATS = (
    '{"prompt": "...", "chosen": "...", "rejected": "..."}, the same with lists of messages, chosen and rejected alone '
    'as lists of messages or as "Human: ... Assistant: ..." transcripts with a common beginning, '
    'or {"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}'
)
TRUE_WORDS = {"true": True, "1": True, "false": False, "0": False}
ANSWER_MARKER = "####"


# ---- fields --------------------------------------------------------------------------------------------------------


def require_columns(place: str, row: Mapping[str, Any], columns: Sequence[str], formats: str = "") -> None:
    """Raises a DataError that names what was found and which formats exist, if a column is missing."""
    missing = [column for column in columns if column not in row]
    if not missing:
        return
    found = join_names(row) or "no columns"
    cure = f" Formats for this use: {formats}." if formats else ""
    raise DataError(f"{place}: no column {', '.join(missing)}; found {found}.{cure}")


def require_string(place: str, row: Mapping[str, Any], column: str) -> str:
    """The column's value, which must be a string."""
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} must be a string, found {name_type(value)}")
    return value


def read_list(place: str, row: Mapping[str, Any], column: str) -> list[Any]:
    """A column that holds a list, or that list as JSON in a string; empty where it is absent or empty."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"{place}: {column}")
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise DataError(f"{place}: {column} must be a list, found {name_type(value)}")
    return value


def read_weight(place: str, row: Mapping[str, Any], column: str = "weight") -> float:
    """The optional weight of a record: a number of at least 0; 1 where it is absent."""
    value: Any = row.get(column)
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):
        value = parse_json(value, f"{place}: {column}")
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{place}: {column} must be a number of at least 0 (0 = not trained on), found {value!r:.40}")
    return float(value)


def read_margin(place: str, row: Mapping[str, Any]) -> float:
    """The optional `margin` of a pair: a number of at least 0; 0 where it is absent."""
    value: Any = row.get("margin")
    if value is None or value == "":
        return 0.0
    if isinstance(value, str):
        value = parse_json(value, f"{place}: margin")
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise DataError(
            f"{place}: margin must be a number of at least 0 (how much better chosen is), found {value!r:.40}; swap "
            "the answers of a pair whose margin is below 0, or remove a column of that name that means something else"
        )
    return float(value)


def read_weights(place: str, values: object, what: str) -> tuple[float, ...]:
    """A list of numbers of at least 0."""
    if isinstance(values, str):
        values = parse_json(values, f"{place}: {what}")
    if not isinstance(values, list):
        raise DataError(f"{place}: {what} must be a list with a number for each token, found {name_type(values)}")
    return tuple(read_weight(f"{place}: {what}[{i}]", {"weight": value}) for i, value in enumerate(values))


def read_numbers(place: str, row: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The optional column `numbers` as floats; None where it is absent."""
    if row.get("numbers") in (None, ""):
        return None
    values = row["numbers"]
    if isinstance(values, str):
        values = parse_json(values, f"{place}: numbers")
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise DataError(f"{place}: numbers must be a list of numbers, found {values!r:.80}")
    return tuple(float(value) for value in values)


def read_label(place: str, value: object, what: str) -> bool:
    """true, false, 1 or 0, also as a string."""
    found = TRUE_WORDS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise DataError(f"{place}: {what} must be true or false, found {value!r:.40}")
    return found


# ---- documents and conversations -----------------------------------------------------------------------------------


def build_document(place: str, row: Row) -> Document:
    """{"text": ...}, optionally `weight` and `token_weights`."""
    row = prepare_row(row)
    require_columns(place, row, ["text"], '{"text": "..."}')
    values = row.get("token_weights")
    token_weights = None if values in (None, "") else read_weights(place, values, "token_weights")
    return Document(require_string(place, row, "text"), read_weight(place, row), token_weights)


def build_chat(place: str, row: Row) -> Conversation:
    """{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}, with `system` and `tools`."""
    row = prepare_row(row)
    column = "messages" if "messages" in row else "conversations"
    return _finish_conversation(place, row, read_list(place, row, column), column)


def build_alpaca(place: str, row: Row) -> Conversation:
    """Earlier turns from `history` ([[question, reply], ...]), then instruction (+ input) and output."""
    row = prepare_row(row)
    require_columns(place, row, ["instruction", "output"])
    messages = _build_alpaca_prompt(place, row)
    reply = {"role": "assistant", "content": require_string(place, row, "output")}
    return _finish_conversation(place, row, [*messages, reply], "instruction")


def build_completion(place: str, row: Row) -> Conversation:
    """{"prompt": ..., "completion": ...}, each a string or a list of messages."""
    row = prepare_row(row)
    require_columns(place, row, ["prompt", "completion"])
    replies = _build_turns(place, row, "completion", "assistant")
    return _finish_conversation(place, row, [*_build_turns(place, row, "prompt", "user"), *replies], "completion")


def _build_turns(place: str, row: Row, column: str, role: str) -> list[Any]:
    value = row[column]
    if isinstance(value, list):
        return value
    return [{"role": role, "content": require_string(place, row, column)}]


def _build_alpaca_prompt(place: str, row: Row) -> list[Message]:
    messages: list[Message] = []
    for index, turn in enumerate(read_list(place, row, "history")):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(f"{place}: history[{index}] must be a [question, reply] pair of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = require_string(place, row, "instruction")
    if row.get("input"):
        question = f"{question}\n{require_string(place, row, 'input')}"
    return [*messages, {"role": "user", "content": question}]


def _finish_conversation(place: str, row: Row, given: list[Any], column: str) -> Conversation:
    """Messages of a prepared row with their weights, the system prompt, tools and media."""
    messages = build_messages(place, given, column)
    record_weight = read_weight(place, row)
    weights, token_weights = [], {}
    for index, (message, raw) in enumerate(zip(messages, given, strict=True)):
        where = f"{column}[{index}]"
        is_answer = message["role"] == "assistant"
        weight = read_weight(f"{place}: {where}", raw)
        if not is_answer and (raw.get("weight") or raw.get("token_weights")):
            raise DataError(
                f"{place}: {where} has the role {message['role']} and a weight; only assistant messages are trained "
                "on, so only they can have one. Remove it"
            )
        weights.append(weight * record_weight if is_answer else 0.0)
        if raw.get("token_weights") is not None:
            token_weights[index] = read_weights(place, raw["token_weights"], f"{where}.token_weights")
    spoken, messages = messages, _add_system(place, row, messages)
    if len(messages) > len(spoken):
        weights = [0.0, *weights]
        token_weights = {index + 1: values for index, values in token_weights.items()}
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}: no assistant message, so there is nothing to learn in this conversation")
    plain = all(w == (message["role"] == "assistant") for w, message in zip(weights, messages, strict=True))
    tools = build_tools(place, row.get("tools"))
    return Conversation(messages, () if plain else tuple(weights), token_weights, tools, read_media(row))


# ---- preferences, feedback, steps ----------------------------------------------------------------------------------


def build_preference(place: str, row: Row) -> Preference:
    """A pair with an explicit prompt (a string, messages, or Alpaca's columns), or with what both have in common.

    A column `margin` says how much better the chosen answer is.
    """
    row = prepare_row(row)
    refuse_tools(place, row)
    require_columns(place, row, ["chosen", "rejected"], PREFERENCE_FORMATS)
    begin = _find_prompt(place, row)
    sides = [_build_side(place, row[column], column, begin is None) for column in ("chosen", "rejected")]
    if begin is None:
        num_common = _count_common_messages(*sides)
        begin, sides = sides[0][:num_common], [side[num_common:] for side in sides]
        prompt = _add_system(place, row, begin)
    else:
        # A full conversation beside an explicit prompt repeats that prompt; what follows it is the reply.
        begin = _add_shared_system(begin, sides)
        prompt = _add_system(place, row, begin)
        sides = [_cut_beginning(side, (prompt, begin)) for side in sides]
    replies = []
    for column, reply in zip(("chosen", "rejected"), sides, strict=True):
        if len(reply) != 1 or reply[0]["role"] != "assistant" or "tool_calls" in reply[0]:
            # More than one message behind what both share: they part before the reply.
            kind = PromptsDifferError if len(reply) > 1 else DataError
            raise kind(
                f"{place}: {column} must end in exactly one assistant message after the common prompt, "
                f"found {len(reply)} ({', '.join(message['role'] for message in reply)}). "
                f"Formats for this use: {PREFERENCE_FORMATS}."
            )
        replies.append(reply[0]["content"])
    if not begin:
        raise PromptsDifferError(f"{place}: chosen and rejected have no common beginning, so there is no prompt")
    chosen, rejected = replies
    return Preference(prompt, chosen, rejected, read_margin(place, row), read_media(row))


def build_feedback(place: str, row: Row) -> Feedback:
    """{"prompt", "completion", "label"}, or messages (or conversations) that end with the reply, and `label`."""
    row = prepare_row(row)
    refuse_tools(place, row)
    require_columns(place, row, ["label"])
    label = read_label(place, row["label"], "label")
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is not None:
        messages = build_messages(place, read_list(place, row, column), column)
    else:
        require_columns(place, row, ["prompt", "completion"])
        turns = [*_build_turns(place, row, "prompt", "user"), *_build_turns(place, row, "completion", "assistant")]
        messages = build_messages(place, turns, "completion")
    messages = _add_system(place, row, messages)
    if messages[-1]["role"] != "assistant" or len(messages) < 2 or "tool_calls" in messages[-1]:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{place}: feedback is about the last message, which must be the assistant's text after a prompt; "
            f"found {roles}"
        )
    return Feedback(messages[:-1], messages[-1]["content"], label, read_media(row))


def build_stepwise(place: str, row: Row) -> Stepwise:
    """{"prompt", "completions": [step, ...], "labels": [true or false, or a number from 0 to 1, ...]}."""
    row = prepare_row(row)
    refuse_tools(place, row)
    require_columns(place, row, ["prompt", "completions", "labels"])
    prompt = _add_system(place, row, build_messages(place, _build_turns(place, row, "prompt", "user"), "prompt"))
    steps, labels = read_list(place, row, "completions"), read_list(place, row, "labels")
    if not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(f"{place}: completions must be a list of strings with at least one, found {steps!r:.80}")
    if len(labels) != len(steps):
        raise DataError(f"{place}: {len(steps)} completions and {len(labels)} labels; each step needs one label")
    values = []
    for index, label in enumerate(labels):
        if type(label) not in (bool, int, float) or not 0 <= label <= 1:
            raise DataError(
                f"{place}: labels[{index}] must be true, false or a number from 0 (wrong) to 1 (right), found "
                f"{label!r:.40}; labels such as -1, 0, 1 must be mapped to that range first"
            )
        values.append(float(label))
    return Stepwise(prompt, tuple(steps), tuple(values), read_media(row))


def refuse_tools(place: str, row: Mapping[str, Any]) -> None:
    """Raises a DataError for definitions of tools, which are read of conversations only."""
    if row.get("tools") not in (None, [], "", "[]"):
        raise DataError(f"{place}: column tools is not supported: only text is read. Remove such rows.")


def _add_system(place: str, row: Row, messages: list[Message]) -> list[Message]:
    """The messages behind the row's system prompt, which they may hold already."""
    system = row.get("system", "")
    if not isinstance(system, str):
        raise DataError(f"{place}: system must be a string, found {name_type(system)}")
    if not system or not messages:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise DataError(
            f"{place}: system says {system!r:.40} and the first message {messages[0]['content']!r:.40}; a conversation "
            "has one system prompt. Remove one of them"
        )
    return messages


def build_prompt_messages(place: str, row: Row) -> list[Message] | None:
    """The explicit prompt of a row with its system prompt; None where there is none."""
    row = prepare_row(row)
    found = _find_prompt(place, row)
    return None if found is None else _add_system(place, row, found)


def _find_prompt(place: str, row: Row) -> list[Message] | None:
    """The prompt without `system`: `prompt`, or else Alpaca's columns, `conversations` or `messages`.

    The last two may stand beside a prompt if they repeat it, alone or with a reply.
    """
    column = next((name for name in ("conversations", "messages") if name in row), None)
    given = row.get("prompt")
    if given is None and "instruction" in row:
        return _build_alpaca_prompt(place, row)
    if given is None or (given == "" and column is not None):
        return None if column is None else build_messages(place, read_list(place, row, column), column)
    prompt = build_messages(place, _build_turns(place, row, "prompt", "user"), "prompt")
    if column is None:
        return prompt
    messages = build_messages(place, read_list(place, row, column), column)
    if messages[0]["role"] == "system" and prompt[0]["role"] != "system":
        prompt = [messages[0], *prompt]
    rest = messages[len(prompt) :]
    if messages[: len(prompt)] != prompt or [message["role"] for message in rest] not in ([], ["assistant"]):
        raise DataError(
            f"{place}: prompt and {column} say different things: {column} may only repeat the prompt, and a reply to "
            "it. Remove one of them"
        )
    return prompt


def _add_shared_system(prompt: list[Message], sides: Sequence[list[Message]]) -> list[Message]:
    """The prompt behind the system prompt that both sides, full conversations, begin with and it does not."""
    first, second = (side[0] for side in sides)
    is_shared = first == second and first["role"] == "system" and prompt[0]["role"] != "system"
    return [first, *prompt] if is_shared else prompt


def _cut_beginning(side: list[Message], prompts: Sequence[list[Message]]) -> list[Message]:
    """What follows the first of `prompts` that the side begins with; all of it where it begins with none."""
    found = (side[len(prompt) :] for prompt in prompts if len(side) > 1 and side[: len(prompt)] == prompt)
    return next(found, side)


def _build_side(place: str, value: object, column: str, holds_prompt: bool) -> list[Message]:
    """One side of a pair as messages; `holds_prompt`: its beginning is the prompt."""
    if isinstance(value, str) and holds_prompt:
        return split_transcript(place, value, column, PREFERENCE_FORMATS)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [build_message(place, value, column)]
    return build_messages(place, value, column)


def _count_common_messages(first: list[Message], second: list[Message]) -> int:
    """Number of equal messages at the beginning, leaving each side at least its last one."""
    count = 0
    while count < min(len(first), len(second)) - 1 and first[count] == second[count]:
        count += 1
    return count


# ---- prompts with answers ------------------------------------------------------------------------------------------


def build_prompt(place: str, row: Row) -> Prompt:
    """{"prompt", "answer", "verifier"}; without a verifier `choose_verifier` says which.

    A prompt may be a list of one user message. An answer with `#### ` is what follows the last marker; the whole of it
    is kept as the solution where there is none. Other columns are carried along.
    """
    columns = {name: value for name, value in row.items() if name not in PROMPT_COLUMNS}
    row = prepare_row(row)
    require_columns(place, row, ["prompt", "answer"], PROMPT_FORMATS)
    prompt = row["prompt"]
    if isinstance(prompt, list):
        messages = build_messages(place, prompt, "prompt")
        if [message["role"] for message in messages] != ["user"]:
            raise DataError(f"{place}: prompt must be a string or one user message, found {len(messages)} messages")
        prompt = messages[0]["content"]
    answer = str(row["answer"]) if type(row["answer"]) in (int, float) else require_string(place, row, "answer")
    optional = {name: require_string(place, row, name) for name in ("task", "solution") if name in row}
    before, marker, after = answer.rpartition(ANSWER_MARKER)
    if marker and "verifier" not in row:
        optional = {"solution": answer, **optional} if before.strip() else optional
        answer = after.strip()
    verifier = require_string(place, row, "verifier") if "verifier" in row else choose_verifier(answer)
    question = require_string(place, {"prompt": prompt}, "prompt")
    task, solution = optional.get("task", ""), optional.get("solution", "")
    return Prompt(question, answer, verifier, task, solution, read_numbers(place, row), columns, read_media(row))


PROMPT_FORMATS = '{"prompt": "...", "answer": "...", "verifier": "number"}, and optionally task, solution, numbers'


def choose_verifier(answer: str) -> str:
    """`math` for an answer with a digit or a backslash in it (numbers, LaTeX), `exact` for words."""
    return "math" if any(character.isdigit() or character == "\\" for character in answer) else "exact"


def rename_columns(place: str, row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the columns that `columns` names (ours: theirs) under our names.

    `role` and `content` name the fields of messages. A column that is not there is a DataError.
    """
    top = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    out = {name: value for name, value in row.items() if name not in top.values() and name not in top}
    for ours, theirs in top.items():
        if theirs not in row:
            found = join_names(row)
            raise DataError(f"{place}: columns says {ours}: {theirs}, and there is no column {theirs}; found {found}")
        out[ours] = row[theirs]
    inner = {columns[ours]: ours for ours in ("role", "content") if ours in columns}
    if not inner:
        return out
    cells = {name: parse_messages(name, cell, [tuple(inner)]) for name, cell in out.items() if isinstance(cell, Cell)}
    return {name: _rename_in_messages(cells.get(name, value), inner) for name, value in out.items()}


def _rename_in_messages(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_rename_in_messages(item, names) for item in value]
    if isinstance(value, dict) and names.keys() <= value.keys():
        return {names.get(key, key): item for key, item in value.items()}
    return value
