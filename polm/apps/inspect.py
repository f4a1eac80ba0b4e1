"""`polm data inspect FILE` on the screen. Text from the file is shown, not obeyed: controls and markup are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polm.data.build import ROLES
from polm.data.inspection import Inspection, Piece, compute_histogram
from polm.errors import UserError
from polm.report.escape import clean_text, shorten

OPEN, CLOSE, BETWEEN = "⟦", "⟧", "│"
SUPERVISED = "bold green"
BAR_WIDTH = 40
EXAMPLE_CHARACTERS = 6000


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """`ours=theirs` words as a mapping."""
    pairs = [word.partition("=") for word in words]
    wrong = next((word for word, (ours, _, theirs) in zip(words, pairs, strict=True) if not (ours and theirs)), None)
    if wrong is not None:
        raise UserError(f"--column {wrong!r} is not of the form ours=theirs, for example --column prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


def list_sources(file: str) -> list[str]:
    """What is inspected: the files of a data set folder one by one, anything else as one."""
    parts = [str(Path(file) / name) for name, _ in ROLES.values() if (Path(file) / name).is_file()]
    return parts or [file]


def print_inspection(console: Console, found: Inspection) -> None:
    """Format, counts, lengths, what is cut, and the example."""
    table = Table.grid(padding=(0, 2))
    for name, value in _list_facts(found):
        table.add_row(Text(name, style="bold", no_wrap=True), _plain(value))
    console.print(table)
    _print_lengths(console, found)
    for reason in found.reasons:
        console.print(_plain(f"cannot be used: {reason}", "red"))
    if found.num_refused > len(found.reasons):
        console.print(_plain(f"… and {found.num_refused - len(found.reasons):,} more rows", "red"))
    if found.example:
        console.print(_build_example(found))


def mark_pieces(pieces: Sequence[Piece]) -> Text:
    """Supervised tokens in green between ⟦ and ⟧ with │ between them; ×0.5 behind a token of that weight.

    The same signs in the text itself are shown as [[, ]] and |.
    """
    out = Text()
    inside = False
    for piece in pieces:
        text = clean_text(piece.text).replace(OPEN, "[[").replace(CLOSE, "]]")
        if piece.weight == 0:
            out.append(CLOSE if inside else "", SUPERVISED)
            out.append(text)
            inside = False
            continue
        out.append(BETWEEN if inside else OPEN, SUPERVISED)
        out.append(text.replace(BETWEEN, "|"), SUPERVISED)
        out.append("" if piece.weight == 1 else f"×{piece.weight:g}", "yellow")
        inside = True
    out.append(CLOSE if inside else "", SUPERVISED)
    return out


def _list_facts(found: Inspection) -> list[tuple[str, str]]:
    kind = found.detection.format.kind.__name__.lower()
    refused = f", {found.num_refused:,} cannot be used" if found.num_refused else ""
    facts = [
        ("file", found.source),
        ("format", f"{found.detection.format.name} ({kind} records; {found.detection.evidence})"),
        ("records", f"{found.num_read:,} of {found.num_rows:,} rows{refused}"),
        ("exact duplicates", f"{found.num_duplicates:,}"),
    ]
    ignored = {name: count for name, count in found.counts.items() if name.startswith("columns_ignored/")}
    facts += [(name, f"{count:,}") for name, count in sorted(found.counts.items()) if count and name not in ignored]
    if ignored:
        names = [f"{name.partition('/')[2]} ({count:,} rows)" for name, count in sorted(ignored.items())]
        facts.append(("columns ignored", ", ".join(names)))
    total = sum(found.lengths)
    share = f"{100 * found.units_supervised / max(1, total):.1f} %"
    facts.append((found.unit, f"{total:,}, of which {found.units_supervised:,} supervised ({share})"))
    if found.unit == "words":
        facts.append(("", "words between white space; with --tokenizer PATH tokens are counted and marked"))
    elif found.context:
        cut = f"{found.num_over:,} records ({100 * found.num_over / found.num_read:.1f} %) are longer than"
        facts.append(("truncated", f"{cut} {found.context:,} tokens; {found.units_over:,} tokens would be cut off"))
    if found.num_unsupervised and found.detection.format.name != "prompts":
        facts.append(("nothing supervised", f"{found.num_unsupervised:,} records"))
    return facts


def _print_lengths(console: Console, found: Inspection) -> None:
    values = np.array(found.lengths)
    points = (0, 50, 90, 99, 100)
    names = ("shortest", "median", "90 %", "99 %", "longest")
    words = ", ".join(f"{name} {np.percentile(values, p):,.0f}" for name, p in zip(names, points, strict=True))
    console.print(_plain(f"length in {found.unit}: {words}", "bold"))
    bins = compute_histogram(found.lengths)
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = "█" * max(round(BAR_WIDTH * count / most), 1 if count else 0)
        over = " ← over the context" if first > found.context else " ← partly over the context"
        over = over if found.context and last > found.context and count else ""
        console.print(_plain(f"{first:>9,} – {last:<9,} {count:>9,} {bar}{over}"))


def _build_example(found: Inspection) -> Panel:
    body = Text()
    for name, pieces in found.example:
        if body:
            body.append("\n")
        body.append(f"{clean_text(name)}\n", "bold cyan")
        body.append_text(mark_pieces(pieces))
    if len(body) > EXAMPLE_CHARACTERS:
        num_more = len(body) - EXAMPLE_CHARACTERS
        body.truncate(EXAMPLE_CHARACTERS)
        body.append(f"\n… {num_more:,} more characters", "dim")
    one = f"{BETWEEN} between tokens" if found.unit == "tokens" else "whole texts, as there is no tokenizer"
    sub = f"{OPEN} supervised {CLOSE}, {one}"
    title = f"{shorten(clean_text(found.example_place), 100)}, as it is trained on"
    return Panel(body, title=Text(title), subtitle=Text(sub), title_align="left", subtitle_align="left")


def _plain(text: str, style: str = "") -> Text:
    return Text(clean_text(text), style, overflow="fold")
