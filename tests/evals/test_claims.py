"""Claims: numbers by hand, what holds, what is refused, and that the committed ones can be made again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import polm
from polm.errors import DataError
from polm.evals.claims import Claim, build_claim, fill_tables, read_claims, write_claims

RESULTS = sorted((Path(polm.__file__).parent.parent / "evidence").glob("*/result.json"))
WORDS = {"metric": "base/greedy (points)", "arm": "remit", "control": "ntp"}


def claim_of(*differences: float, better: Any = "higher") -> dict[str, Any]:
    return build_claim("remit is better", differences=differences, better=better, **WORDS)


def test_numbers_by_hand() -> None:
    """Mean 2, deviation 1, so the error is 1 / sqrt(3), and t of two degrees is 4.3027."""
    margin = 4.302653 / math.sqrt(3)
    assert claim_of(1.0, 2.0, 3.0) == {
        "claim": "remit is better",
        **WORDS,
        "seeds": 3,
        "mean": 2.0,
        "stderr": 0.5774,
        "interval95": [round(2 - margin, 4), round(2 + margin, 4)],
        "differences": [1.0, 2.0, 3.0],
        "holds": False,
    }


@pytest.mark.parametrize(
    ("differences", "higher", "lower", "either"),
    [
        ((1.0, 1.1, 1.2), True, False, True),
        ((-1.0, -1.1, -1.2), False, True, True),
        ((1.0, -1.0, 0.2), False, False, False),
        ((0.0, 0.0), False, False, False),
        ((0.2, 0.2), False, False, False),  # equal differences show no spread
        ((0.6 - 0.8, 0.4 - 0.6), False, False, False),  # nor where rounding tells them apart
    ],
)
def test_what_holds(differences: tuple[float, ...], higher: bool, lower: bool, either: bool) -> None:
    held = {better: claim_of(*differences, better=better)["holds"] for better in ("higher", "lower", "either")}
    assert held == {"higher": higher, "lower": lower, "either": either}


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ((), "rests on 0 seeds; at least two are needed"),
        ((1.0,), "rests on 1 seeds; at least two are needed"),
        ((1.0, math.nan), "the claim 'remit is better': values: 1 of 2 values are not finite"),
        ((1.0, math.inf), "not finite"),
    ],
)
def test_what_cannot_be_claimed(differences: tuple[float, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        claim_of(*differences)


def test_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    claims = [claim_of(1.0, 1.1), {**claim_of(1.0, -1.1), "note": {"by_seed": [1.5]}}]
    write_claims(path, claims)
    first, second = read_claims(path)
    assert first == Claim(**claims[0])
    assert second.model_extra == {"note": {"by_seed": [1.5]}}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    # What cannot be written leaves what was there.
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"result.json: entry 1: mean: .*finite number \(found nan\)"):
        write_claims(path, [{**claims[0], "mean": math.nan}])
    with pytest.raises(DataError, match=r"entry 2: note\.by_seed\.0: found inf, expected a finite number"):
        write_claims(path, [claims[0], {**claims[1], "note": {"by_seed": [math.inf]}}])
    assert path.read_bytes() == before


ONE_SEED = {"seeds": 1, "stderr": None, "interval95": None, "differences": [1.05], "holds": False}
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"holds": ...}, "entry 2: holds: Field required; expected a claim with the fields claim, metric, "),
    "words": ({"holds": "yes"}, r"entry 2: holds: .*boolean \(found 'yes'\)"),
    "seeds": ({"seeds": 0}, r"entry 2: seeds: .*greater than or equal to 1 \(found 0\)"),
    "empty": ({"claim": ""}, "entry 2: claim: "),
    "infinite": ({"stderr": math.inf}, "entry 2: stderr: "),
    "negative": ({"stderr": -1.0}, "entry 2: stderr: "),
    "interval": ({"interval95": [1.0]}, "entry 2: interval95: "),
    "outside": ({"mean": 7.0}, r"entry 2: the mean 7.0 does not lie in interval95 \["),
    "lengths": ({"differences": [1.0]}, "entry 2: differences has 1 values for 2 seeds"),
    "no interval": ({"interval95": None}, "entry 2: stderr and interval95 may be null only together"),
    "one seed": ({**ONE_SEED, "holds": True}, "entry 2: holds is true without an interval; one seed shows nothing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    changes, message = DAMAGE[kind]
    good = claim_of(1.0, 1.1)
    bad = {key: value for key, value in {**good, **changes}.items() if value is not ...}
    path = tmp_path / "result.json"
    path.write_text(json.dumps([good, bad]))
    with pytest.raises(DataError, match=f"{path}: {message}"):
        read_claims(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, found something else"),
        ("{}", "expected a list of at least one claim, found dict"),
        ("[]", "expected a list of at least one claim, found an empty list"),
        ("[3]", "entry 1: "),
    ],
)
def test_no_list_of_claims(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        read_claims(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_claims(tmp_path / "gone.json")


def test_one_seed_may_be_recorded(tmp_path: Path) -> None:
    write_claims(tmp_path / "result.json", [{**claim_of(1.0, 1.1), **ONE_SEED}])
    assert read_claims(tmp_path / "result.json")[0].interval95 is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_results_are_valid(path: Path) -> None:
    assert read_claims(path)


def test_the_flywheel_follows_from_its_differences(tmp_path: Path) -> None:
    """The committed file is what `write_claims` writes, and its claims are what `build_claim` makes of the seeds."""
    (path,) = (path for path in RESULTS if path.parent.name == "flywheel")
    write_claims(tmp_path / "again.json", json.loads(path.read_text()))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    for claim in read_claims(path):
        assert claim.differences is not None
        better = "either" if "differs" in claim.claim else "lower" if "nats" in claim.metric else "higher"
        again = build_claim("x", **WORDS, differences=claim.differences, better=better)  # type: ignore[arg-type]
        # The differences in the file are rounded to 3 decimals.
        assert again["mean"] == pytest.approx(claim.mean, abs=6e-4)
        assert again["stderr"] == pytest.approx(claim.stderr, abs=6e-4)
        assert again["interval95"] == pytest.approx(claim.interval95, abs=3e-3)
        assert again["holds"] == claim.holds


def test_tables_are_put_where_their_marks_are(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# a\n\n<!-- x -->\n<!-- end -->\n\nb\n\n<!-- y -->\nkept\n<!-- end -->\nc\n")
    fill_tables(readme, {"x": "| old |\n"})
    fill_tables(readme, {"x": "| new |\n"})
    assert readme.read_text() == (
        "# a\n\n<!-- x -->\n\n| new |\n\n<!-- end -->\n\nb\n\n<!-- y -->\nkept\n<!-- end -->\nc\n"
    )
    with pytest.raises(DataError, match="no mark <!-- z -->"):
        fill_tables(readme, {"z": "| t |"})
    readme.write_text("<!-- x -->\nwithout an end\n")
    with pytest.raises(DataError, match="no mark <!-- x --> with an <!-- end -->"):
        fill_tables(readme, {"x": "| t |"})
