"""Small builders of HTML. Every argument that ends in `_html` is already safe; every other text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polm.report.compare import CONTROL_NAME, Arm
from polm.report.escape import esc
from polm.report.load import Run


@dataclass(frozen=True)
class Cell:
    """One cell of a table: safe HTML, and the classes that align and colour it."""

    html: str
    classes: str = ""


def text_cell(value: object, classes: str = "") -> Cell:
    return Cell(esc(value), classes)


def code_cell(value: object) -> Cell:
    return Cell(f"<code>{esc(value)}</code>")


def number_cell(value: float | None, decimals: int = 0) -> Cell:
    """A number with thin spaces between the thousands; a dash for None."""
    return Cell("–" if value is None else format_count(value, decimals), "num")


def format_count(value: float, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "\u2212")


def build_table(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "", classes: str = ""
) -> str:
    """A table that scrolls sideways on a narrow page; a heading that starts with ">" belongs to a column of numbers."""
    head = "".join(
        f'<th scope="col"{" class=num" if heading.startswith(">") else ""}>{esc(heading.removeprefix(">"))}</th>'
        for heading in headings
    )
    body = "".join(f"<tr>{_build_cells(row)}</tr>" for row in rows)
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{esc(classes)}">{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _build_cells(row: Sequence[Cell]) -> str:
    first, *others = row
    return f'<th scope="row" class="{esc(first.classes)}">{first.html}</th>' + "".join(
        f'<td class="{esc(cell.classes)}">{cell.html}</td>' for cell in others
    )


def build_details(summary: str, content_html: str, *, is_open: bool = False) -> str:
    """A part that folds, without a script."""
    return f"<details{' open' if is_open else ''}><summary>{esc(summary)}</summary>{content_html}</details>"


def build_grid(parts: Sequence[str]) -> str:
    """Plots side by side, as many as fit."""
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def build_paragraph(text: str, classes: str = "") -> str:
    return f'<p class="{esc(classes)}">{esc(text)}</p>' if classes else f"<p>{esc(text)}</p>"


def compute_arm_styles(run: Run) -> dict[Arm, tuple[int, int]]:
    """Colour and dash of every arm: the colour follows the name (the control has the first), the dash the cycle."""
    names = dict.fromkeys([CONTROL_NAME, *(node.spec.arm for node in run.nodes if node.spec.arm)])
    series = {name: index for index, name in enumerate(names)}
    styles: dict[Arm, tuple[int, int]] = {}
    num_cycles: dict[str, int] = {}
    for node in run.nodes:
        if not node.spec.arm:
            continue
        arm = Arm(-1 if node.spec.cycle is None else node.spec.cycle, node.spec.arm)
        if arm not in styles:
            styles[arm] = (series[arm.name], num_cycles.get(arm.name, 0))
            num_cycles[arm.name] = num_cycles.get(arm.name, 0) + 1
    return styles
