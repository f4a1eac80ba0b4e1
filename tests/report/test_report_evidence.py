"""docs/evidence.md: up to date, with every claim, and nothing acts that stands in a result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import polm
from polm.errors import DataError
from polm.evals.claims import read_claims
from polm.report.evidence import build_evidence_page

ROOT = Path(polm.__file__).parent.parent
README = "# A title\n\n**Question.** Does it\nhelp?\n\n**Setting.** None.\n"
CLAIM = {
    **{"claim": "x is better", "metric": "m (points)", "arm": "x", "control": "y", "seeds": 3, "mean": 1.234},
    **{"stderr": 0.3, "interval95": [-0.04, 2.5], "holds": False},
}


def write(folder: Path, name: str, *claims: dict[str, Any], readme: str = README) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(claims))
    (folder / name / "README.md").write_text(readme)
    return folder


def test_the_committed_page_is_up_to_date() -> None:
    """If this fails: `polm evidence`."""
    page = ROOT / "docs" / "evidence.md"
    assert page.read_text() == build_evidence_page(ROOT / "evidence", page)


def test_a_page_out_of_date_is_noticed(tmp_path: Path) -> None:
    """The same check on a copy whose results have changed by one verdict."""
    shutil.copytree(ROOT / "evidence", tmp_path / "evidence")
    page = tmp_path / "docs" / "evidence.md"
    before = build_evidence_page(tmp_path / "evidence", page)
    assert before == (ROOT / "docs" / "evidence.md").read_text()
    path = tmp_path / "evidence" / "flywheel" / "result.json"
    claims = json.loads(path.read_text())
    claims[0]["holds"] = not claims[0]["holds"]
    path.write_text(json.dumps(claims))
    assert build_evidence_page(tmp_path / "evidence", page) != before


def test_the_committed_page_has_every_claim() -> None:
    lines = (ROOT / "docs" / "evidence.md").read_text().splitlines()
    claims = [claim for path in (ROOT / "evidence").glob("*/result.json") for claim in read_claims(path)]
    rows = [line for line in lines if line.endswith((" **shown** |", " not shown |"))]
    assert len(rows) == len(claims)
    assert sum(line.endswith(" **shown** |") for line in rows) == sum(claim.holds for claim in claims)


def test_a_section(tmp_path: Path) -> None:
    small = {**CLAIM, "mean": -0.0136, "stderr": 0.0007, "interval95": [-0.0153, -0.0119], "holds": True}
    single = {**CLAIM, "seeds": 1, "stderr": None, "interval95": None}
    folder = write(tmp_path / "evidence", "b", CLAIM, small, single)
    (folder / "b" / "figure.png").write_bytes(b"")
    write(folder, "a c", CLAIM, readme=README.replace("A title", "The first"))
    page = build_evidence_page(folder, tmp_path / "docs" / "evidence.md")
    first, section = page.split("## ")[1:]
    assert first.startswith("The first\n\nDoes it help?\n\n0 of 1 claims shown. ")
    assert "(../evidence/a%20c/README.md)" in first
    assert "1 of 3 claims shown. [setting, command and discussion](../evidence/b/README.md) · " in section
    assert "[figure.png](../evidence/b/figure.png)" in section
    assert "| x is better | m (points) | +1.2 | 0.3 | −0.0 to +2.5 | 3 | not shown |" in section
    assert "| −0.0136 | 0.0007 | −0.0153 to −0.0119 | 3 | **shown** |" in section
    assert "| +1.2 | – | – | 1 | not shown |" in section
    assert page == build_evidence_page(folder, tmp_path / "docs" / "evidence.md")


def test_text_of_results_stays_text(tmp_path: Path, hostile: str) -> None:
    claim = {**CLAIM, "claim": f"a | b\n\n# c {hostile} [x](http://y) `z` *q*"}
    page = build_evidence_page(write(tmp_path, "a", claim), tmp_path / "x.md")
    (row,) = (line for line in page.splitlines() if "not shown |" in line)
    assert r"a \| b # c " in row
    assert r"\[x\](http://y) \`z\` \*q\*" in row
    assert "<" not in row
    assert "\u202e" not in row


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("no heading", "README.md: found no title, expected a line '# …'"),
        ("# t\n\nno question", r"README.md: found no question, expected '\*\*Question"),
    ],
)
def test_a_readme_that_says_too_little(tmp_path: Path, readme: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_evidence_page(write(tmp_path, "a", CLAIM, readme=readme), tmp_path / "x.md")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no \*/result.json, expected at least one"):
        build_evidence_page(tmp_path, tmp_path / "x.md")
    folder = write(tmp_path, "a", CLAIM)
    (folder / "a" / "README.md").unlink()
    with pytest.raises(DataError, match=r"README\.md: cannot be read"):
        build_evidence_page(folder, tmp_path / "x.md")
    (folder / "a" / "result.json").write_text(json.dumps([{**CLAIM, "seeds": "many"}]))
    with pytest.raises(DataError, match=r"a/result.json: entry 1: seeds: "):
        build_evidence_page(folder, tmp_path / "x.md")
