"""The tables of evidence/remit: what its README and its result say is what the files of the seeds say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import polm

FOLDER = Path(polm.__file__).parent.parent / "evidence" / "remit"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("remit")


def test_the_result_and_the_tables_are_what_the_seeds_say(script: ModuleType) -> None:
    """If this fails: `python evidence/remit/run.py table`."""
    rows = script.read_seeds()
    claims = script.build_claims([*rows["bases"], *rows["whole"]])
    studies = {kind: script.build_claims(rows[kind], where=f"{kind}: ") for kind in script.STUDIES}
    expected = [*claims, *(claim for found in studies.values() for claim in found)]
    assert json.loads((FOLDER / "result.json").read_text()) == expected
    text = (FOLDER / "README.md").read_text()
    tables = script.write_tables(rows["bases"], rows["whole"], claims) | script.write_study_tables(claims, studies)
    for table in (*tables.values(), script.write_chains(rows["whole"])):
        assert table.strip() in text


def test_a_cell_is_mean_and_interval(script: ModuleType) -> None:
    """Plausible differences of three seeds by hand: mean 2, deviation 1, t(2) = 4.303."""
    rows = [
        {"scores": {"ntp · cycle 0": {"base": {"greedy": 0.5}}, "plausible · cycle 1": {"base": {"greedy": value}}}}
        for value in (0.51, 0.52, 0.53)
    ]
    tables = importlib.import_module("tables")
    by_key = tables.index_claims(script.build_claims(rows))
    cells = tables.write_cells(by_key, "plausible · cycle 1", tables.NTP, ["base/greedy"])
    assert cells == ["+2.0 (−0.5 to +4.5)"]
    assert tables.write_cells(by_key, "rho1 · cycle 1", tables.NTP, ["base/greedy"]) is None


def test_a_map_marks_what_is_shown(script: ModuleType) -> None:
    """Three seeds a metric: surely better, surely worse, not shown, and less of what is better lower."""
    gains = {
        "greedy": (0.521, 0.522, 0.523),
        "pass@1": (0.477, 0.478, 0.479),
        "steps@1": (0.40, 0.50, 0.61),
        "nll": (0.477, 0.478, 0.479),
    }
    ntp = dict.fromkeys(gains, 0.5)
    rows = []
    for place in range(3):
        mine = {metric: values[place] for metric, values in gains.items()}
        others = {f"{arm} · cycle 1": {"base": ntp} for arm in ("shuffled", "rho1", "distill", "remit")}
        rows.append({"scores": {"ntp · cycle 0": {"base": ntp}, **others, "plausible · cycle 1": {"base": mine}}})
    tables = importlib.import_module("tables")
    claims = script.build_claims(rows)
    _, _, *lines = tables.write_map([("here", claims), ("not run", [])]).splitlines()
    assert lines == ["| here |" + " `· · · ·` |" * 4 + " `+ − · +` |" * 4]
