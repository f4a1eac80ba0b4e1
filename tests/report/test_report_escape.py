"""Text that acts or lies is made harmless."""

from __future__ import annotations

from polm.report.escape import clean_text, esc, shorten


def test_markup_and_quotes_are_escaped() -> None:
    assert esc("</script><img src=x onerror='a(\"b\")'>&") == (
        "&lt;/script&gt;&lt;img src=x onerror=&#x27;a(&quot;b&quot;)&#x27;&gt;&amp;"
    )


def test_controls_and_direction_marks_become_visible() -> None:
    assert clean_text("a\x00b\x1b[31mc\x7f\x85") == "a⟨U+0000⟩b⟨U+001B⟩[31mc⟨U+007F⟩⟨U+0085⟩"
    assert clean_text("x\u202ey\u2066z\u200f\u2028") == "x⟨U+202E⟩y⟨U+2066⟩z⟨U+200F⟩⟨U+2028⟩"
    assert clean_text("half \ud800 pair") == "half \ufffd pair"


def test_ordinary_text_is_left_alone() -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    for text in ("a\n\tb", "Grüße, 数学, עברית", family, "e\u0301"):
        assert clean_text(text) == text
    assert clean_text("a\r\nb") == "a\nb"


def test_shorten_keeps_the_limit() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdef", 5) == "abcd…"
