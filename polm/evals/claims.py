"""Claims with their evidence: built from paired differences, written to and read from `result.json`.

A claim is one sentence, its difference (arm minus control, one a seed) and whether it holds. A claim that does not hold
stays in the file: a null result is a result. Nothing but finite numbers gets in or out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polm.errors import DataError
from polm.evals.statistics import compute_mean_stderr, compute_t_interval

Words = Annotated[str, Field(min_length=1)]


class Claim(BaseModel):
    """One entry of result.json. `mean` and the rest are in the unit that `metric` names; other keys are kept.

    With one seed there is neither a standard error nor an interval, and nothing is shown.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    claim: Words
    metric: Words
    arm: Words
    control: Words
    seeds: Annotated[int, Field(ge=1)]
    mean: float
    stderr: Annotated[float, Field(ge=0)] | None
    interval95: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    holds: bool
    differences: list[float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if (self.interval95 is None) != (self.stderr is None) or (self.interval95 is None and self.seeds > 1):
            raise ValueError("stderr and interval95 may be null only together, and only for one seed")
        if self.interval95 is None and self.holds:
            raise ValueError("holds is true without an interval; one seed shows nothing")
        if self.interval95 is not None and not self.interval95[0] <= self.mean <= self.interval95[1]:
            raise ValueError(f"the mean {self.mean} does not lie in interval95 {self.interval95}")
        if self.differences is not None and len(self.differences) != self.seeds:
            raise ValueError(f"differences has {len(self.differences)} values for {self.seeds} seeds")
        return self


def build_claim(
    claim: str,
    *,
    metric: str,
    arm: str,
    control: str,
    differences: Sequence[float],
    better: Literal["higher", "lower", "either"],
) -> dict[str, Any]:
    """An entry of result.json from one paired difference (arm minus control) a seed, in the unit named in `metric`.

    It holds if the 95 % t interval over the seeds lies on the side that the claim says: "higher" above zero, "lower"
    below, "either" on one of the two. Equal differences show no spread, so with them nothing holds. Raises DataError
    for less than two seeds and for numbers that are not finite.
    """
    if len(differences) < 2:
        raise DataError(
            f"the claim {claim!r} rests on {len(differences)} seeds; at least two are needed for an interval"
        )
    try:
        spread, interval = compute_mean_stderr(differences), compute_t_interval(differences)
    except DataError as error:
        raise DataError(f"the claim {claim!r}: {error}") from error
    above = interval.excludes_zero and interval.low95 > 0
    below = interval.excludes_zero and interval.high95 < 0
    return {
        "claim": claim,
        "metric": metric,
        "arm": arm,
        "control": control,
        "seeds": len(differences),
        "mean": round(spread.mean, 4),
        "stderr": round(spread.stderr, 4),
        "interval95": [round(interval.low95, 4), round(interval.high95, 4)],
        "differences": [round(value, 3) for value in differences],
        "holds": {"higher": above, "lower": below, "either": above or below}[better],
    }


def write_claims(path: Path, claims: Sequence[Mapping[str, Any]]) -> None:
    """Write result.json, whole or not at all. Raises DataError for an entry that `read_claims` would refuse."""
    _parse(list(claims), path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(list(claims), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_claims(path: Path) -> tuple[Claim, ...]:
    """The claims of a result.json. Raises DataError that names the file, the entry and the field."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the script beside it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, found something else ({error}); run the script beside it") from error
    return _parse(values, path)


def _parse(values: Any, path: Path) -> tuple[Claim, ...]:
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else type(values).__name__
        raise DataError(f"{path}: expected a list of at least one claim, found {found}")
    return tuple(_parse_one(value, f"{path}: entry {number}") for number, value in enumerate(values, 1))


def _parse_one(value: Any, where: str) -> Claim:
    try:
        claim = Claim.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        shown = f" (found {first['input']!r})" if place and first["type"] != "missing" else ""
        raise DataError(f"{where}: {place + ': ' if place else ''}{message}{shown}; expected a claim with the fields "
                        f"{', '.join(Claim.model_fields)}") from None  # fmt: skip
    for field, number in _list_numbers(claim.model_extra or {}):
        if not math.isfinite(number):
            raise DataError(f"{where}: {field}: found {number}, expected a finite number")
    return claim


def _list_numbers(value: Any, field: str = "") -> Iterator[tuple[str, float]]:
    """All floats within a JSON value, each with its dotted place."""
    if isinstance(value, float):
        yield field, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield from _list_numbers(inner, f"{field}.{key}" if field else str(key))


def fill_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Put tables where a README has their marks, `<!-- NAME -->` to `<!-- end -->`; the rest of it stays.

    Raises DataError for a mark that is missing.
    """
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise DataError(f"{path}: no mark <!-- {name} --> with an <!-- end --> after it; put it back")
        text = f"{before}{mark}\n{table.strip()}\n\n{end}{after}"
    path.write_text(text, encoding="utf-8")
