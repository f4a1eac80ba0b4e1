"""docs/evidence.md: every claim of `evidence/*/result.json` on one page, those that were not shown included.

The page is generated and never edited; the same files give the same bytes, and a test compares it with them.
"""

from __future__ import annotations

import html
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

from polm.errors import DataError
from polm.evals.claims import Claim, read_claims
from polm.report.escape import clean_text

RESULT = "result.json"
QUESTION = "**Question.**"
OPENING = """# Evidence

Written by `polm evidence` from `evidence/*/result.json`; do not edit. A difference is the arm minus the control, paired
by seed; the interval is the 95 % t interval over the seeds. "Shown" means that the interval lies on the side of zero
that the claim names; "not shown" is no proof of the contrary. One in twenty intervals excludes zero by chance.
"""


def build_evidence_page(folder: Path, out: Path) -> str:
    """The page as Markdown, with links from `out` to the folders below `folder`.

    Raises DataError if there is no result, or if a result or its README is not as it should be.
    """
    results = sorted(folder.glob(f"*/{RESULT}"))
    if not results:
        raise DataError(f"{folder}: found no */{RESULT}, expected at least one; name the folder with the evidence")
    return "\n".join([OPENING, *(_build_section(path, out) for path in results)])


def _build_section(path: Path, out: Path) -> str:
    claims = read_claims(path)
    title, question = _read_readme(path.with_name("README.md"))
    num_shown = sum(claim.holds for claim in claims)
    links = [f"[setting, command and discussion]({_build_link(path.with_name('README.md'), out)})"]
    links += [f"[{figure.name}]({_build_link(figure, out)})" for figure in sorted(path.parent.glob("*.png"))]
    rows = [
        "| claim | measure | difference | standard error | 95 % interval | seeds | |",
        "|---|---|---|---|---|---|---|",
        *(_build_row(claim) for claim in claims),
    ]
    return "\n".join(
        [
            f"## {title}\n",
            f"{question}\n",
            f"{num_shown} of {len(claims)} claims shown. {' · '.join(links)}\n",
            *rows,
            "",
        ]
    )


def _read_readme(path: Path) -> tuple[str, str]:
    """(title, question): the first heading, and the paragraph that begins with **Question.**"""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); every result has a README beside it") from error
    title = next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), "")
    question = next((part for part in re.split(r"\n\s*\n", text) if part.strip().startswith(QUESTION)), "")
    question = " ".join(question.replace(QUESTION, "", 1).split())
    for what, found, expected in (("title", title, "a line '# …'"), ("question", question, f"'{QUESTION} …'")):
        if not found:
            raise DataError(f"{path}: found no {what}, expected {expected}")
    return title, question


def _build_link(target: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(target, out.parent)).as_posix())


def _build_row(claim: Claim) -> str:
    spread = claim.stderr if claim.stderr is not None else abs(claim.mean)
    decimals = _choose_decimals(spread)
    interval = "–"
    if claim.interval95 is not None:
        low, high = claim.interval95
        interval = f"{_format_bound(low, decimals)} to {_format_bound(high, decimals)}"
    cells = [
        _escape(claim.claim),
        _escape(claim.metric),
        _format_signed(claim.mean, decimals),
        "–" if claim.stderr is None else f"{claim.stderr:.{decimals}f}",
        interval,
        str(claim.seeds),
        "**shown**" if claim.holds else "not shown",
    ]
    return f"| {' | '.join(cells)} |"


def _choose_decimals(spread: float) -> int:
    """So many that the first digit of the spread is seen; 1 to 4, as results are rounded to 4."""
    return 4 if spread <= 0 else min(4, max(1, -math.floor(math.log10(spread))))


def _format_signed(value: float, decimals: int) -> str:
    """With its sign and a real minus; what rounds to zero has none."""
    text = f"{value:+.{decimals}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "\u2212")


def _format_bound(value: float, decimals: int) -> str:
    """A bound keeps its sign even where it rounds to zero: the side is the point."""
    sign = "+" if value > 0 else "\u2212" if value < 0 else ""
    return f"{sign}{abs(value):.{decimals}f}"


def _escape(text: str) -> str:
    """Text as text: no Markdown, no HTML, one line."""
    safe = html.escape(" ".join(clean_text(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", safe)
