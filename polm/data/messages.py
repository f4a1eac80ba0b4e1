"""Messages, tool calls and transcripts as users write them, in the one form that chat templates take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from polm.data.files import Cell, join_names, name_type, parse_json
from polm.data.records import Message, Row
from polm.errors import DataError

# What is read of a message; other fields are counted as ignored.
FIELDS = frozenset(["role", "content", "from", "value", "name", "tool_call_id", "tool_calls", "function_call"])
WEIGHT_FIELDS = frozenset(("weight", "token_weights"))
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
OPENAI_ROLES = {**ROLES, "function": "tool"}  # before there were tools, there were functions
SHAREGPT_ROLES = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
CALL_ROLE = "function_call"  # its text is a call in JSON, or a list of calls
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
MESSAGE_FIELDS = (("role", "content"), ("role", "tool_calls"), ("role", "function_call"), ("from", "value"))
LISTS = ("messages", "conversations")
MESSAGE_COLUMNS = (*LISTS, "prompt", "completion", "chosen", "rejected")


def prepare_row(row: Mapping[str, Any]) -> Row:
    """The row as it is read: without columns that are null, and with lists where messages are JSON in a string."""
    out: Row = {}
    for name, value in row.items():
        if name in MESSAGE_COLUMNS and isinstance(value, str):
            out[name] = parse_messages(name, value, MESSAGE_FIELDS)
        elif value is not None:
            out[name] = str(value) if isinstance(value, Cell) else value
    return out


def parse_messages(column: str, text: str, fields: Iterable[tuple[str, ...]]) -> Any:
    """Messages that are JSON in a string; the string itself where it holds anything else.

    `messages` and `conversations` are lists, so a string there is JSON. Elsewhere a string is text, but in a CSV, which
    has no lists: there it is messages if each has all of some of `fields`. A side of a pair may be one message.
    """
    if isinstance(text, Cell) or column in LISTS:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            items = [value] if isinstance(value, dict) and column in ("chosen", "rejected") else value
            if isinstance(items, list) and items and (column in LISTS or all(_has_some(i, fields) for i in items)):
                return value
    return str(text)


def _has_some(message: object, fields: Iterable[tuple[str, ...]]) -> bool:
    return isinstance(message, dict) and any(message.keys() >= set(names) for names in fields)


def build_messages(place: str, value: object, column: str) -> list[Message]:
    """Checks a list of {"role", "content"} or {"from", "value"} messages and returns it in the first form."""
    if isinstance(value, list) and value:
        return [build_message(place, message, f"{column}[{index}]") for index, message in enumerate(value)]
    raise DataError(f"{place}: {column} must be a list of messages with at least one, found {value!r:.80}")


def build_message(place: str, message: object, where: str) -> Message:
    """One message: role, text, and what belongs to tools."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        given, content, roles = message["from"], message["value"], SHAREGPT_ROLES
    elif isinstance(message, dict) and "role" in message and not FIELDS.isdisjoint(message.keys() - {"role", "name"}):
        given, content, roles = message["role"], message.get("content"), OPENAI_ROLES
    else:
        found = join_names(message) if isinstance(message, dict) else name_type(message)
        raise DataError(
            f"{place}: {where} needs role and content (or from and value), found {found}. Other names can be given: "
            "columns: {role: ..., content: ...}"
        )
    if not isinstance(given, str) or given not in roles:
        raise DataError(f"{place}: {where} has the role {given!r:.40}; allowed: {', '.join(roles)}")
    if given == CALL_ROLE and roles is SHAREGPT_ROLES:
        value = parse_json(content, f"{place}: {where}") if isinstance(content, str) else content
        calls = value if isinstance(value, list) else [value]
        return {"role": "assistant", "content": "", "tool_calls": _build_calls(place, calls, where)}
    out: Message = {"role": roles[given], "content": ""}
    older = [message["function_call"]] if message.get("function_call") else None
    if given_calls := message.get("tool_calls") or older:
        out["tool_calls"] = _build_calls(place, given_calls, where)
        if out["role"] != "assistant":
            raise DataError(f"{place}: {where} has tool_calls and the role {given}; only the assistant calls tools")
    out["content"] = _read_content(place, content, where, may_be_absent="tool_calls" in out)
    out |= {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    return out


def build_tools(place: str, value: object) -> list[Row]:
    """Tool definitions, a list or a string that holds it as JSON, each as {"type": "function", "function": {...}}."""
    if isinstance(value, str):
        value = parse_json(value, f"{place}: tools") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{place}: tools must be a list of functions (or that list as JSON), found {name_type(value)}")
    out = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{place}: tools[{index}] needs a name: {{"name": ..., "description": ..., "parameters": ...}}, found '
                f"{tool!r:.80}"
            )
        out.append({"type": "function", "function": function})
    return out


def read_media(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a prepared row refers to beside its text: media columns, and parts of messages that are no text."""
    found = []
    for column in MEDIA_COLUMNS:
        value = row.get(column)
        if not value or value == "[]":
            continue
        items = value if isinstance(value, list) else [value]
        found += [f"{column}: {item}"[:200] if isinstance(item, str) else column for item in items]
    for column in MESSAGE_COLUMNS:
        value = row.get(column)
        messages = value if isinstance(value, list) else [value]
        contents = [m.get("content", m.get("value")) for m in messages if isinstance(m, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        found += [str(part.get("type")) for part in parts if isinstance(part, dict) and part.get("type") != "text"]
    return tuple(found)


def split_transcript(place: str, text: str, column: str, formats: str) -> list[Message]:
    """Splits a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript, as the HH-RLHF files hold it, into messages.

    Paragraphs that belong to the speaker before, and a speaker who speaks twice, are joined.
    """
    messages: list[Message] = []
    for paragraph in ("\n\n" + text.lstrip("\n")).split("\n\n")[1:]:
        speaker, colon, content = paragraph.partition(":")
        role = HH_ROLES.get(speaker) if colon else None
        if role is not None and (not messages or messages[-1]["role"] != role):
            messages.append({"role": role, "content": content.strip()})
        elif messages:
            addition = content.strip() if role is not None else paragraph
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{addition}".strip()
        else:
            raise DataError(
                f"{place}: {column} is a string without a prompt beside it and does not begin with "
                f'"Human:". Formats for this use: {formats}.'
            )
    return messages


def _read_content(place: str, content: object, where: str, *, may_be_absent: bool) -> str:
    """The text of a message: a string, or parts of which the texts are joined."""
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        texts = [part.get("text") for part in content if part["type"] == "text"]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise DataError(
        f"{place}: {where} has {name_type(content)} as its content; expected a string, or a list of parts such as "
        '{"type": "text", "text": "..."}'
    )


def _build_calls(place: str, calls: object, where: str) -> list[Row]:
    """Calls as {"type": "function", "function": {"name": str, "arguments": object}}, with `id` where there is one."""
    if not isinstance(calls, list) or not calls:
        raise DataError(f"{place}: {where}: tool_calls must be a list with at least one call, found {calls!r:.80}")
    out = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise DataError(
                f'{place}: {where}: call {index} needs {{"name": ..., "arguments": {{...}}}}, found {call!r:.80}'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments or "{}", f"{place}: {where}: arguments of {name}")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: {where}: arguments of {name} must be an object, found {name_type(arguments)}")
        row: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
        out.append({"id": call["id"], **row} if isinstance(call.get("id"), str) else row)
    return out
