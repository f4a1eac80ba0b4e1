"""Text from data and models, made safe to show.

Two dangers: text that acts (markup in a page, escape sequences in a terminal) and text that lies (characters that turn
the reading direction around, or cannot be seen). `clean_text` makes the second kind visible and harmless everywhere;
`esc` adds the escaping of HTML.
"""

from __future__ import annotations

import html
import unicodedata

# U+2400 to U+241F are pictures of the control characters U+0000 to U+001F.
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}


def _show_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"  # half of a surrogate pair: cannot be written as UTF-8
    # Cc: the rest of the controls. Cf: direction marks and overrides, zero-width characters, tags.
    # The zero-width joiner stays, because emoji and several scripts are written with it.
    if category in ("Cc", "Cf", "Zl", "Zp") and character not in "\n\t\u200d\u200c":
        return f"\u27e8U+{ord(character):04X}\u27e9"
    return character


def clean_text(text: str) -> str:
    """`text` with control and direction characters replaced by visible marks; line ends become one newline."""
    text = text.replace("\r\n", "\n").translate(_PICTURES)
    if text.isascii():
        return text
    return "".join(map(_show_character, text))


def esc(value: object) -> str:
    """Any value as text that is safe in HTML content and in a quoted attribute."""
    return html.escape(clean_text(str(value)), quote=True)


def shorten(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, with an ellipsis as the last one if something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
