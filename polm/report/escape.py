"""Text from data and models, made safe to show.

Two dangers: text that acts (markup in a page, escape sequences in a terminal) and text that lies (characters that turn
the reading direction around, or cannot be seen). `clean_text` makes the second kind visible and harmless everywhere;
`esc` adds the escaping of HTML.
"""

from __future__ import annotations

import html
import unicodedata


def _show_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"  # half of a surrogate pair: cannot be written as UTF-8
    # Cc: controls. Cf: direction marks and overrides, zero-width characters, tags.
    # The zero-width joiner stays, because emoji and several scripts are written with it.
    if category in ("Cc", "Cf", "Zl", "Zp") and character not in "\n\t\u200d\u200c":
        return f"\u27e8U+{ord(character):04X}\u27e9"
    return character


def clean_text(text: str) -> str:
    """`text` with control and direction characters replaced by visible marks; line ends become one newline."""
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(map(_show_character, text))


def esc(value: object) -> str:
    """Any value as text that is safe in HTML content and in a quoted attribute."""
    return html.escape(clean_text(str(value)), quote=True)


def shorten(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, with an ellipsis as the last one if something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
